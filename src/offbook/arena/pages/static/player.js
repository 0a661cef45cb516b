// Videos that run locked together, with steps, speeds and a cursor on the traces; the moment stands in the address.
"use strict";
(() => {
  const setUp = (root) => {
    if (root.dataset.ready) return;
    root.dataset.ready = "yes";
    const films = [...root.querySelectorAll("video")];
    const rate = Number(root.dataset.rate) || 30;
    const traces = JSON.parse(root.dataset.traces || "{}");
    const times = traces.time || [];
    const charts = [...root.querySelectorAll(".trace")];
    const controls = root.querySelector(".controls");
    const play = controls.querySelector('[data-do="play"]');
    const slider = controls.querySelector("input");
    const readout = root.querySelector(".readout");
    let step = 0, speed = 1, playing = false;

    controls.hidden = false;
    readout.hidden = false;
    for (const film of films) {
      film.controls = false;
      film.addEventListener("click", () => toggle());
      film.addEventListener("error", () => {
        film.closest("figure").querySelector("figcaption").textContent = "This video cannot be played here; it may still be on its way. Reload in a moment.";
      });
    }
    if (!films.length) for (const part of controls.querySelectorAll('[data-do="play"], .speeds')) part.hidden = true;

    const known = () => films.filter((film) => film.readyState > 0 && Number.isFinite(film.duration));
    // The longest film leads; the others follow it and rest on their last frame.
    const leader = () => known().reduce((best, film) => (!best || film.duration > best.duration ? film : best), null);
    const last = () => Math.max(times.length - 1, Math.round((leader()?.duration || 0) * rate) - 1, 0);
    const timeOf = (k) => (k < times.length ? times[k] : k / rate);
    const stepAt = (t) => {
      if (!times.length) return Math.round(t * rate);
      let low = 0, high = times.length - 1;
      while (low < high) {
        const middle = (low + high + 1) >> 1;
        if (times[middle] <= t + 0.5 / rate) low = middle;
        else high = middle - 1;
      }
      return low;
    };

    const show = () => {
      slider.max = last();
      slider.value = step;
      const t = timeOf(step);
      slider.setAttribute("aria-valuetext", `step ${step}, ${t.toFixed(2)} seconds`);
      for (const chart of charts) {
        const share = `${Math.min(100, (100 * t) / Number(chart.dataset.end))}%`;
        const cursor = chart.querySelector(".cursor");
        cursor.setAttribute("x1", share);
        cursor.setAttribute("x2", share);
      }
      const words = [`step ${step} of ${last()}`, `${t.toFixed(2)} s`];
      const number = (value, digits) => (typeof value === "number" ? value.toFixed(digits) : "–");
      if (traces.reward) words.push(`reward ${number(traces.reward[step], 3)}`);
      if (traces.latency_ms) words.push(`answer after ${number(traces.latency_ms[step], 1)} ms${traces.late?.[step] ? ", late" : ""}`);
      for (const key of ["observation", "action"]) {
        const values = traces[key]?.[step];
        if (Array.isArray(values)) words.push(`${key} ${values.map((value) => number(value, 3)).join(" ")}`);
      }
      readout.textContent = words.join(" · ");
    };

    const remember = () => history.replaceState(null, "", `#t=${timeOf(step).toFixed(3)}`);
    const seek = (k, keep = true) => {
      step = Math.min(last(), Math.max(0, Math.round(k)));
      // The middle of a frame, so that rounding never shows the one before.
      for (const film of known()) film.currentTime = Math.min((step + 0.5) / rate, Math.max(0, film.duration - 0.001));
      show();
      if (keep && !playing) remember();
    };
    const pause = () => {
      playing = false;
      for (const film of films) film.pause();
      play.textContent = "Play";
    };
    const follow = () => {
      if (!playing) return;
      const first = leader();
      for (const film of known()) {
        if (film !== first && !film.ended && Math.abs(film.currentTime - first.currentTime) > 1.5 / rate) {
          film.currentTime = Math.min(first.currentTime, film.duration - 0.001);
        }
      }
      step = Math.min(last(), Math.floor(first.currentTime * rate + 1e-3));
      show();
      if (first.ended) { pause(); remember(); } else requestAnimationFrame(follow);
    };
    const toggle = () => {
      if (playing) { pause(); seek(step); return; }
      const first = leader();
      if (!first) return;
      if (step >= last()) seek(0, false);
      playing = true;
      play.textContent = "Pause";
      for (const film of known()) {
        film.playbackRate = speed;
        film.play().catch(() => { if (film === first) pause(); });
      }
      requestAnimationFrame(follow);
    };
    const walk = (by) => { pause(); seek(step + by); };
    const setSpeed = (wanted) => {
      speed = wanted;
      for (const film of films) film.playbackRate = speed;
      for (const button of controls.querySelectorAll("[data-speed]")) button.setAttribute("aria-pressed", String(Number(button.dataset.speed) === speed));
    };

    controls.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      if (button.dataset.speed) setSpeed(Number(button.dataset.speed));
      else ({ play: toggle, back: () => walk(-1), on: () => walk(1) })[button.dataset.do]();
    });
    slider.addEventListener("input", () => { pause(); seek(Number(slider.value)); });
    for (const chart of charts) {
      const point = (event) => {
        const box = chart.getBoundingClientRect();
        pause();
        seek(stepAt(((event.clientX - box.left) / box.width) * Number(chart.dataset.end)));
      };
      chart.addEventListener("pointerdown", point);
      chart.addEventListener("pointermove", (event) => { if (event.buttons & 1) point(event); });
    }
    document.addEventListener("keydown", (event) => {
      if (!root.isConnected || event.ctrlKey || event.metaKey || event.altKey) return;
      const target = event.target;
      if (target.matches("input, textarea, select")) return;
      if (event.key === " " && !target.matches("button, a, summary")) toggle();
      else if (event.key === "ArrowLeft") walk(event.shiftKey ? -10 : -1);
      else if (event.key === "ArrowRight") walk(event.shiftKey ? 10 : 1);
      else if (/^[0-4]$/.test(event.key)) setSpeed(Number(event.key) || 0.25);
      else return;
      event.preventDefault();
    });

    const asked = () => /^#t=(\d+(?:\.\d+)?)$/.exec(location.hash)?.[1];
    const begin = () => {
      const at = asked() ?? root.dataset.start;
      if (at === undefined) show();
      else seek(stepAt(Number(at)), false);
    };
    addEventListener("hashchange", () => { if (asked() !== undefined && root.isConnected) { pause(); seek(stepAt(Number(asked()))); } });
    for (const film of films) film.addEventListener("loadedmetadata", begin);
    begin();
  };
  const all = () => document.querySelectorAll("[data-player]").forEach(setUp);
  document.addEventListener("refreshed", all);
  all();
})();
