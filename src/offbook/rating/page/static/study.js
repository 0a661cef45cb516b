// What owners see and do: their token is sent in a header, so the page is asked for once more with it.
"use strict";
(() => {
  const keep = (value) => { try { if (value) sessionStorage.setItem("owner", value); else sessionStorage.removeItem("owner"); } catch { /* kept for this page alone */ } };
  let token = "";
  try { token = sessionStorage.getItem("owner") || ""; } catch { /* nothing is remembered here */ }

  const complain = (text) => {
    const place = document.getElementById("complaint");
    place.textContent = text;
    place.hidden = !text;
  };
  const ask = async (path, options = {}) => {
    const headers = { Authorization: `Bearer ${token}`, Accept: "application/json", ...options.headers };
    const answer = await fetch(path, { ...options, headers, cache: "no-store" });
    if (answer.ok) return answer;
    const record = await answer.json().catch(() => ({}));
    if (answer.status === 401) { token = ""; keep(""); throw new Error("This token opens nothing here."); }
    throw new Error(record.detail ? `${record.detail} ${record.hint}` : `The service refused (${answer.status}).`);
  };
  const show = async () => {
    const page = new DOMParser().parseFromString(await (await ask(location.pathname, { headers: { Accept: "text/html" } })).text(), "text/html");
    document.getElementById("main").replaceChildren(...page.getElementById("main").childNodes);
    document.dispatchEvent(new Event("refreshed"));
  };
  const attempt = async (act) => {
    complain("");
    try { await act(); } catch (error) { complain(error.message); }
  };

  document.addEventListener("submit", (event) => {
    const form = event.target;
    if (form.matches("[data-sign-in]")) {
      event.preventDefault();
      token = form.querySelector("input").value.trim(); // nameless: no browser sends it with the form
      attempt(async () => { await show(); keep(token); });
    } else if (form.matches("[data-invite]")) {
      event.preventDefault();
      const body = { count: Number(form.elements.count.value), kind: form.elements.kind.value, cohort: form.elements.cohort.value };
      const panel = form.closest("[data-api]");
      attempt(async () => {
        const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
        const { raters } = await (await ask(`${panel.dataset.api}/raters`, options)).json();
        const place = panel.querySelector("[data-invitations]");
        place.querySelector("code").textContent = raters.map((rater) => location.origin + rater.path).join("\n");
        place.hidden = false;
      });
    }
  });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-act], [data-sign-out]");
    if (!button) return;
    if (button.matches("[data-sign-out]")) { keep(""); location.reload(); return; }
    if (!confirm(button.dataset.ask)) return;
    attempt(async () => { await ask(`${button.closest("[data-api]").dataset.api}/${button.dataset.act}`, { method: "POST" }); await show(); });
  });
  if (token) attempt(show);
})();
