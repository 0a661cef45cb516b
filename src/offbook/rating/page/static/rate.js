// Pairs, one after the other: shows two sides, waits until they were looked at, and sends the answer until it is kept.
"use strict";
(() => {
  const API = "/api/rating/v1/";
  const $ = (id) => document.getElementById(id);
  const sides = ["left", "right"];
  const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", b: "both_bad", s: "skip" };
  const FOLD = 4000;

  // What stands behind the # is not sent by browsers; once read it goes out of the address too.
  const read = () => { try { return sessionStorage.getItem("invitation") || ""; } catch { return ""; } };
  let token = location.hash.startsWith("#rt_") ? location.hash.slice(1) : read();
  try { if (token) sessionStorage.setItem("invitation", token); } catch { /* kept for this page alone */ }
  if (location.hash.startsWith("#rt_")) history.replaceState(null, "", location.pathname);
  addEventListener("hashchange", () => { if (location.hash.startsWith("#rt_")) location.reload(); });

  class Refusal extends Error {
    constructor(status, body) { super(body.detail || ""); this.status = status; this.error = body.error; this.hint = body.hint || ""; }
  }
  const ask = async (path, body) => {
    const options = { headers: { Authorization: `Bearer ${token}`, Accept: "application/json" }, cache: "no-store" };
    if (body !== undefined) {
      options.method = "POST";
      options.headers["Content-Type"] = "application/json";
      options.body = JSON.stringify(body);
    }
    const answer = await fetch(API + path, options);
    const record = await answer.json().catch(() => ({}));
    if (!answer.ok) throw new Refusal(answer.status, record);
    return record;
  };

  const only = (part, title) => {
    for (const id of ["message", "welcome", "pair"]) $(id).hidden = id !== part;
    $("main").dataset.part = part;
    $("title").textContent = title;
    $("title").focus({ preventScroll: true });
  };
  const tell = (title, text, again) => {
    only("message", title);
    $("message-text").textContent = text;
    $("again").hidden = !again;
    $("again").onclick = again || null;
  };
  const say = (text, wrong) => {
    if ($("status").textContent !== text) $("status").textContent = text;
    $("status").classList.toggle("wrong", Boolean(wrong));
  };
  const stumble = (error, again) => {
    if (!(error instanceof Refusal)) tell("No connection", "The service does not answer. Nothing that was saved is lost.", again);
    else if (error.status === 401) tell("This page needs an invitation", "Open the link that you were sent, whole, with all that stands behind the # sign.");
    else if (error.error === "study_closed") tell("This study is closed", "Nothing is left to judge. Thank you.");
    else if (error.error === "study_not_open") tell("Not open yet", "This study is still being prepared. Come back later with the same link.", again);
    else tell("That did not work", `${error.message} ${error.hint}`, again);
  };

  let study = null, pair = null, films = [], shown = [], chosen = new Set(), notice = "", noticeEnd = 0, shownAt = 0, dwell = 0, sending = false, playing = false;

  // Only time in which the page can be seen is time spent looking.
  const looked = () => dwell + (shownAt && !document.hidden ? performance.now() - shownAt : 0);
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) { if (shownAt) { dwell += performance.now() - shownAt; shownAt = 0; } pause(); }
    else if (pair && ready()) shownAt = performance.now();
  });

  // Films
  const known = () => films.filter((film) => Number.isFinite(film.duration) && film.duration > 0);
  const leader = () => known().reduce((best, film) => (!best || film.duration > best.duration ? film : best), null);
  const share = (film) => {
    let seen = 0;
    for (let i = 0; i < film.played.length; i += 1) seen += film.played.end(i) - film.played.start(i);
    return film.duration > 0 ? Math.min(1, seen / film.duration) : 0;
  };
  const leastWatched = () => (films.length === 2 ? Math.min(...films.map(share)) : 0);
  const pause = () => { playing = false; for (const film of films) film.pause(); $("play").textContent = "Play both"; };
  const play = () => {
    const first = leader();
    if (!first) return;
    if (known().every((film) => film.ended || film.currentTime >= film.duration - 0.01)) for (const film of known()) film.currentTime = 0;
    playing = true;
    $("play").textContent = "Pause";
    for (const film of known()) if (film.currentTime < film.duration - 0.01) film.play().catch(() => { if (film === first) pause(); });
  };
  const follow = () => {
    const first = leader();
    if (!first) return;
    if (playing) {
      for (const film of known()) {
        if (film !== first && !film.ended && Math.abs(film.currentTime - first.currentTime) > 0.1) film.currentTime = Math.min(first.currentTime, film.duration - 0.001);
      }
      if (first.ended) pause();
    }
    if (document.activeElement !== $("scrub") || playing) $("scrub").value = String(Math.round((1000 * first.currentTime) / first.duration));
    $("scrub").setAttribute("aria-valuetext", `${first.currentTime.toFixed(1)} of ${first.duration.toFixed(1)} seconds`);
  };
  $("play").addEventListener("click", () => (playing ? pause() : play()));
  $("scrub").addEventListener("input", () => {
    const first = leader();
    if (!first) return;
    pause();
    const moment = (first.duration * Number($("scrub").value)) / 1000;
    for (const film of known()) film.currentTime = Math.min(moment, film.duration - 0.001);
  });
  for (const button of document.querySelectorAll("[data-speed]")) {
    button.addEventListener("click", () => {
      for (const film of films) film.playbackRate = Number(button.dataset.speed);
      for (const other of document.querySelectorAll("[data-speed]")) other.setAttribute("aria-pressed", String(other === button));
    });
  }

  // Contents
  const showText = (place, text) => {
    const part = document.createElement("div");
    part.className = "text";
    part.dir = "auto";
    part.textContent = text.length > FOLD + 500 ? `${text.slice(0, FOLD)}…` : text;
    place.append(part);
    place.tabIndex = 0;
    if (part.textContent.length >= text.length) return;
    const more = document.createElement("button");
    more.type = "button";
    more.textContent = `Show all ${text.length.toLocaleString()} characters`;
    more.addEventListener("click", () => { part.textContent = text; more.remove(); place.focus(); });
    place.append(more);
  };
  const showMedia = (place, side, content) => new Promise((resolve) => {
    const film = content.kind === "video";
    const element = document.createElement(film ? "video" : "img");
    const name = side[0].toUpperCase() + side.slice(1);
    if (film) Object.assign(element, { muted: true, playsInline: true, preload: "auto", disablePictureInPicture: true });
    else element.alt = `${name} picture`;
    if (film) { element.setAttribute("aria-label", `${name} video`); films.push(element); element.addEventListener("click", () => (playing ? pause() : play())); }
    element.addEventListener(film ? "loadeddata" : "load", () => resolve(element), { once: true });
    element.addEventListener("error", () => {
      films = films.filter((other) => other !== element);
      const words = document.createElement("p");
      words.className = "broken";
      words.textContent = `This ${film ? "video" : "picture"} cannot be shown here. `;
      const retry = document.createElement("button");
      retry.type = "button";
      retry.textContent = "Load again";
      retry.addEventListener("click", () => show(pair));
      words.append(retry);
      element.replaceWith(words);
      resolve(null);
    }, { once: true });
    element.src = content.url;
    place.append(element);
  });
  // One pixel of either side is as large as one of the other.
  const size = (element) => [element.videoWidth || element.naturalWidth || 1, element.videoHeight || element.naturalHeight || 1];
  const scale = () => {
    const there = shown.filter(Boolean);
    if (!there.length) return;
    const stacked = matchMedia("(max-width: 48rem)").matches;
    const box = (element) => element.getBoundingClientRect();
    const frames = box($("panes")).height - shown.reduce((sum, one) => (stacked ? sum + (one ? box(one).height : 0) : Math.max(sum, one ? box(one).height : 0)), 0);
    const answers = document.querySelector(".answers");
    // On a wide page all is seen at once; on a phone both sides are, and the rest a thumb away.
    const below = stacked ? 0 : box($("note-part")).bottom - box($("panes")).bottom + 16;
    const room = innerHeight - (box($("panes")).top + scrollY) - frames - below - box(answers).height;
    const height = Math.max(stacked ? 120 : 200, stacked ? room / 2 : room);
    const width = $("left-content").clientWidth - 16;
    const by = Math.min(8, width / Math.max(...there.map((one) => size(one)[0])), height / Math.max(...there.map((one) => size(one)[1])));
    for (const one of there) { one.style.width = `${Math.floor(size(one)[0] * by)}px`; one.style.height = `${Math.floor(size(one)[1] * by)}px`; }
  };
  addEventListener("resize", scale);

  // What is still missing before an answer is taken, in words.
  const ready = () => shown.length === 2 || (pair && pair.left.kind === "text");
  const missing = () => {
    // Also of a film that stops loading after it had begun.
    if ($("panes").querySelector(".broken")) return `One side is missing: load it again${study.options.includes("skip") ? ", or skip this pair" : ""}.`;
    if (!ready()) return "Loading…";
    const seconds = Math.ceil(study.min_dwell_s - looked() / 1000);
    if (study.min_watch > 0 && leastWatched() < study.min_watch) return `Watch both videos: ${Math.floor(100 * leastWatched())} % so far, ${Math.round(100 * study.min_watch)} % wanted.`;
    return looked() / 1000 < study.min_dwell_s ? `Look for ${seconds} more second${seconds === 1 ? "" : "s"}.` : "";
  };
  const watch = () => {
    follow();
    if (sending || !pair) return;
    const words = missing();
    for (const button of document.querySelectorAll("[data-choice]")) button.setAttribute("aria-disabled", String(Boolean(words) && button.dataset.choice !== "skip"));
    const noticed = performance.now() < noticeEnd;
    say(noticed ? notice : words || "Which one is it?", noticed);
  };

  const show = async (given) => {
    pair = given;
    only("pair", study.question);
    [films, shown, dwell, shownAt, sending] = [[], [], 0, 0, false];
    chosen = new Set();
    $("note").value = "";
    $("note-part").open = false;
    for (const chip of $("chips").children) chip.setAttribute("aria-pressed", "false");
    for (const button of document.querySelectorAll("[data-speed]")) button.setAttribute("aria-pressed", String(button.dataset.speed === "1"));
    $("progress").hidden = false;
    $("bar").max = given.progress.most;
    $("bar").value = given.progress.done;
    $("count").textContent = `Pair ${given.progress.done + 1} of at most ${given.progress.most}`;
    $("prompt").hidden = !given.prompt;
    $("prompt").textContent = given.prompt;
    const text = given.left.kind === "text";
    $("panes").classList.toggle("text-pair", text);
    $("player").hidden = given.left.kind !== "video";
    for (const side of sides) {
      $(side).classList.remove("chosen");
      const old = $(`${side}-content`), place = old.cloneNode(false);
      place.removeAttribute("tabindex");
      place.className = text ? "content" : "content media";
      old.replaceWith(place);
      if (text) showText(place, given[side].text);
    }
    scrollTo(0, 0);
    watch();
    if (!text) {
      const loaded = await Promise.all(sides.map((side) => showMedia($(`${side}-content`), side, given[side])));
      if (pair !== given) return;
      shown = loaded;
      scale();
      if (films.length && !matchMedia("(prefers-reduced-motion: reduce)").matches && !document.hidden) play();
    }
    if (!document.hidden) shownAt = performance.now();
    watch();
  };

  const advance = async () => {
    try {
      const given = await ask("next");
      if (given.done) {
        pair = null;
        $("bar").max = $("bar").value = 1;
        $("count").textContent = `${given.progress.done} judged`;
        if (given.later) tell("Nothing at the moment", "Others are judging what is left. Some of it may come back: look again later, with the same link.", advance);
        else tell("Thank you", given.progress.done ? "That was the last pair for you. Your answers are saved; you may close this page." : "There is nothing to judge for you at the moment.");
      } else await show(given);
    } catch (error) {
      stumble(error, advance);
    }
  };

  const send = async (choice) => {
    if (sending || !pair || !study.options.includes(choice)) return;
    if (choice !== "skip" && missing()) { watch(); return; }
    sending = true;
    pause();
    const body = { nonce: pair.nonce, choice, reasons: [...chosen], note: $("note").value.trim(), dwell_ms: Math.round(looked()), client_ms: Date.now() };
    if (pair.left.kind === "video") body.watched = Number(leastWatched().toFixed(3));
    if (sides.includes(choice)) $(choice).classList.add("chosen");
    say("Saving…");
    // The same vote may be sent again and again: it is kept once.
    for (let attempt = 0; ; attempt += 1) {
      try {
        await ask(`assignments/${pair.assignment}/vote`, body);
        break;
      } catch (error) {
        const gone = error instanceof Refusal && error.status < 500 && error.status !== 429;
        if (gone && ["expired", "voted", "not_yours", "not_found"].includes(error.error)) {
          notice = error.error === "expired" ? "Too late: the pair before had been taken back, and your answer to it was not saved. Here is the next one."
            : "The pair before had been answered or taken back. Here is the next one.";
          noticeEnd = performance.now() + 8000;
          break;
        }
        if (gone) { stumble(error, () => show(pair)); return; }
        say(`Not saved yet: no answer from the service. Trying again (${attempt + 1})…`, true);
        await new Promise((resolve) => setTimeout(resolve, Math.min(15000, 500 * 2 ** attempt)));
      }
    }
    await advance();
  };
  for (const button of document.querySelectorAll("[data-choice]")) button.addEventListener("click", () => send(button.dataset.choice));

  document.addEventListener("keydown", (event) => {
    if (!pair || $("pair").hidden || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    const target = event.target;
    if (target.matches("textarea, input")) return;
    // In a text that scrolls, the arrows scroll.
    if (event.key === "ArrowDown" && target.scrollHeight > target.clientHeight + 1 && target.matches(".content, .prompt")) return;
    const choice = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    const chip = /^[1-9]$/.test(event.key) && $("chips").children[Number(event.key) - 1];
    if (choice) send(choice);
    else if (chip) chip.click();
    else if (event.key === " " && films.length && !target.matches("button, summary")) { if (playing) pause(); else play(); }
    else return;
    event.preventDefault();
  });

  const prepare = (told) => {
    study = told;
    document.title = told.question;
    $("noun").textContent = { text: "texts", image: "pictures", video: "videos", rollout: "videos of a robot" }[told.modality];
    for (const part of document.querySelectorAll("[data-option]")) part.hidden = !told.options.includes(part.dataset.option);
    for (const part of document.querySelectorAll("[data-film]")) part.hidden = !["video", "rollout"].includes(told.modality);
    for (const part of document.querySelectorAll("[data-reasons]")) part.hidden = !told.reasons.length;
    $("reasons").hidden = !told.reasons.length;
    $("chips").replaceChildren(...told.reasons.map((reason, i) => {
      const chip = document.createElement("button"), key = document.createElement("kbd");
      chip.type = "button";
      key.textContent = String(i + 1);
      chip.setAttribute("aria-pressed", "false");
      chip.append(...(i < 9 ? [key] : []), reason);
      chip.addEventListener("click", () => {
        if (!chosen.delete(reason)) chosen.add(reason);
        chip.setAttribute("aria-pressed", String(chosen.has(reason)));
      });
      return chip;
    }));
  };
  const begin = async () => {
    try {
      await ask("consent", {});
      study.consented = true;
      await advance();
    } catch (error) {
      stumble(error, begin);
    }
  };
  $("begin").addEventListener("click", begin);
  const start = async () => {
    if (!token) { stumble(new Refusal(401, {})); return; }
    try {
      prepare(await ask("invitation"));
      if (study.state === "closed") stumble(new Refusal(410, { error: "study_closed" }));
      else if (study.consented) await advance();
      else only("welcome", study.question);
    } catch (error) {
      stumble(error, start);
    }
  };
  setInterval(watch, 100);
  start();
})();
