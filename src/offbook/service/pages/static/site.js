// On every page: light and dark, times in the reader's zone, copying, and the keys / j k.
"use strict";
(() => {
  const root = document.documentElement;

  const isDark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const themeSwitch = document.querySelector("[data-theme-switch]");
  const nameTheme = () => { themeSwitch.textContent = isDark() ? "Light" : "Dark"; };
  themeSwitch.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("theme", root.dataset.theme); } catch { /* not remembered, still switched */ }
    nameTheme();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
  nameTheme();

  const styles = {
    day: { day: "numeric", month: "short", year: "numeric" },
    minute: { day: "numeric", month: "short", year: "numeric", hour: "2-digit", minute: "2-digit" },
    second: { hour: "2-digit", minute: "2-digit", second: "2-digit" },
  };
  const tellTimes = () => {
    for (const time of document.querySelectorAll("time[data-style]")) {
      time.textContent = new Intl.DateTimeFormat(undefined, styles[time.dataset.style]).format(new Date(time.dateTime));
    }
  };
  tellTimes();
  document.addEventListener("refreshed", tellTimes);

  // A long table names its columns once; its rows are then lists of values.
  const records = (name) => {
    const table = document.querySelector(`[data-table="${name}"]`);
    const columns = table.dataset.columns && JSON.parse(table.dataset.columns);
    const rows = [...table.querySelectorAll("[data-record]")].map((row) => JSON.parse(row.dataset.record));
    return columns ? rows.map((row) => Object.fromEntries(columns.map((column, i) => [column, row[i]]))) : rows;
  };
  // A cell that begins like a formula would run in a spreadsheet.
  const cell = (value) => {
    let text = value === null || value === undefined ? "" : String(value);
    if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const csv = (rows) => [Object.keys(rows[0] || {}), ...rows.map((row) => Object.values(row))].map((row) => row.map(cell).join(",")).join("\n") + "\n";
  const texts = {
    text: (button) => button.parentElement.querySelector("code").textContent,
    csv: (button) => csv(records(button.dataset.from)),
    json: (button) => JSON.stringify(records(button.dataset.from), null, 2),
  };
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-copy]");
    if (!button) return;
    const label = button.dataset.label || button.textContent;
    button.dataset.label = label;
    try {
      await navigator.clipboard.writeText(texts[button.dataset.copy](button));
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not allowed here";
    }
    setTimeout(() => { button.textContent = label; }, 1500);
  });

  const move = (by) => {
    const doors = [...document.querySelectorAll("[data-row]")].map((row) => row.querySelector("a[href]") || row).filter((door) => door.offsetParent);
    if (!doors.length) return;
    const now = doors.findIndex((door) => door.closest("[data-row]").contains(document.activeElement));
    const next = doors[now < 0 ? (by > 0 ? 0 : doors.length - 1) : Math.min(doors.length - 1, Math.max(0, now + by))];
    if (!next.matches("a")) next.tabIndex = -1;
    next.focus();
    next.scrollIntoView({ block: "nearest" });
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const search = document.querySelector("[data-search]");
    if (event.target.matches("input:not([type=radio], [type=range]), textarea, select")) {
      if (event.key === "Escape") event.target.blur();
    } else if (event.key === "/" && search) {
      event.preventDefault();
      search.focus();
      search.select();
    } else if (event.key === "j") move(1);
    else if (event.key === "k") move(-1);
  });
})();
