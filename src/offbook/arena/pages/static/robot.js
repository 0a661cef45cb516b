// A robot's page: the newest picture once a second, and the operator's two buttons, which ask once.
"use strict";
(() => {
  const figure = document.querySelector("[data-frame]");
  const none = document.querySelector("[data-no-frame]");
  const image = figure.querySelector("img");
  const show = (seen) => {
    figure.hidden = !seen;
    none.hidden = seen;
  };
  image.addEventListener("load", () => show(true));
  image.addEventListener("error", () => show(false));
  const look = () => {
    if (!document.hidden) image.src = `${figure.dataset.frame}?at=${Date.now()}`;
  };
  look();
  setInterval(look, 1000);

  const form = document.querySelector("form.operate");
  const token = form.querySelector("input"); // without a name, so that no browser sends or keeps it with the form
  const told = form.querySelector("output");
  let asked = null, timer = 0;
  const calm = () => {
    if (asked) asked.textContent = asked.dataset.words;
    asked = null;
    clearTimeout(timer);
  };
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = event.submitter;
    if (asked !== button) {
      calm();
      asked = button;
      button.dataset.words = button.textContent;
      button.textContent = `Really? ${button.textContent}`;
      timer = setTimeout(calm, 5000);
      return;
    }
    calm();
    told.textContent = "Asking the arena…";
    try {
      const headers = { Authorization: `Bearer ${token.value.trim()}` };
      const answer = await fetch(`${form.dataset.robot}/${button.value}`, { method: "POST", headers });
      const body = await answer.json();
      told.textContent = answer.ok ? (body.stopped ? "Stopped." : "It may go on.") : `Refused: ${body.detail}`;
    } catch {
      told.textContent = "The arena cannot be reached: use the stop at the robot itself.";
    }
  });
})();
