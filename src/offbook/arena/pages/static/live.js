// Live parts: when the arena tells of a change, the page is asked for again and its parts marked data-live are renewed.
"use strict";
(() => {
  const status = document.getElementById("live-status");
  const parts = () => document.querySelectorAll("[data-live]");
  // What the server sent, before other scripts touched it: only a part that the server changed is renewed.
  const sent = new Map([...parts()].map((part) => [part.id, part.innerHTML]));
  let busy = false, again = false, timer = 0, last = 0;

  const say = (text, state) => {
    if (!status) return;
    if (status.textContent !== text) status.textContent = text;
    status.className = `live scripted ${state}`;
  };
  const clock = () => new Date().toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });

  const renew = (part, html) => {
    const checked = [...part.querySelectorAll("input:checked")].map((input) => [input.name, input.value]);
    const held = part.contains(document.activeElement) && document.activeElement;
    const same = held && (held.href ? `a[href="${CSS.escape(held.getAttribute("href"))}"]` : held.name ? `[name="${CSS.escape(held.name)}"][value="${CSS.escape(held.value)}"]` : "");
    const left = part.querySelector(".scroll")?.scrollLeft;
    part.innerHTML = html;
    for (const [name, value] of checked) {
      const input = part.querySelector(`[name="${CSS.escape(name)}"][value="${CSS.escape(value)}"]`);
      if (input) input.checked = true;
    }
    if (same) part.querySelector(same)?.focus({ preventScroll: true });
    if (left) part.querySelector(".scroll").scrollLeft = left;
  };

  const refresh = async () => {
    if (busy) { again = true; return; }
    busy = true;
    last = Date.now();
    try {
      const answer = await fetch(location.pathname + location.search, { headers: { Accept: "text/html" }, cache: "no-store" });
      if (!answer.ok) throw new Error(String(answer.status));
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const part of parts()) {
        const fresh = page.getElementById(part.id);
        if (fresh && fresh.innerHTML !== sent.get(part.id)) {
          sent.set(part.id, fresh.innerHTML);
          renew(part, fresh.innerHTML);
        }
      }
      document.dispatchEvent(new Event("refreshed"));
      return true;
    } catch {
      say(`The arena cannot be reached. This is what was known at ${known}; trying again.`, "off");
      return false;
    } finally {
      busy = false;
      if (again) { again = false; soon(); }
    }
  };
  let known = clock();
  // At most one request every two seconds, however much happens.
  const soon = () => {
    timer ||= setTimeout(async () => { timer = 0; if (await refresh()) known = clock(); }, Math.max(50, last + 2000 - Date.now()));
  };

  if (status) {
    let poll = 0;
    const source = new EventSource("/v1/events");
    source.addEventListener("open", () => {
      clearInterval(poll);
      poll = 0;
      say("Live", "on");
      soon(); // of what happened before, the stream tells nothing
    });
    source.addEventListener("message", soon);
    source.addEventListener("error", () => {
      if (poll) return;
      // The browser opens the stream again by itself unless it was refused; asking now and then works in both cases.
      poll = setInterval(async () => {
        if (await refresh()) {
          known = clock();
          say("Renewed every 15 seconds", "on");
        }
      }, 15000);
      say(`The live connection was lost. This is what was known at ${known}; trying again.`, "off");
    });
    addEventListener("pagehide", () => source.close());
  }

  const search = document.querySelector("[data-search]");
  if (search) {
    let typed = 0;
    search.form.addEventListener("submit", (event) => event.preventDefault());
    search.addEventListener("input", () => {
      clearTimeout(typed);
      typed = setTimeout(() => {
        const address = new URL(location.href);
        address.searchParams.delete("page");
        if (search.value) address.searchParams.set("q", search.value);
        else address.searchParams.delete("q");
        history.replaceState(null, "", address);
        refresh();
      }, 200);
    });
  }
})();
