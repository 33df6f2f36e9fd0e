// All that the site does beyond plain pages: theme, keys, the layout of diffs, the search. Nothing depends on it.
"use strict";

const root = document.documentElement;

function kept(name, value) { // file:// may refuse to store: then a choice lasts for one page
  try {
    if (value === undefined) return localStorage.getItem(name);
    localStorage.setItem(name, value);
  } catch { return null; }
}

if (kept("theme")) root.dataset.theme = kept("theme");
if (kept("view")) root.dataset.view = kept("view");

function setUpTheme() {
  const button = document.getElementById("theme-switch");
  const names = ["auto", "light", "dark"];
  const show = () => {
    const now = root.dataset.theme || "auto";
    button.textContent = { auto: "◐", light: "☀", dark: "☾" }[now];
    button.title = { auto: "Theme: as the system has it", light: "Theme: light", dark: "Theme: dark" }[now];
    button.setAttribute("aria-label", button.title);
  };
  button.hidden = false;
  button.onclick = () => {
    const next = names[(names.indexOf(root.dataset.theme || "auto") + 1) % 3];
    if (next === "auto") delete root.dataset.theme;
    else root.dataset.theme = next;
    kept("theme", next);
    show();
  };
  show();
}

function setUpDiff() {
  const switches = document.querySelector(".switches");
  if (!switches) return;
  switches.hidden = false;
  const view = document.getElementById("view-switch");
  const fold = document.getElementById("fold-switch");
  const wide = matchMedia("(min-width: 68rem)");
  const isSplit = () => (root.dataset.view ? root.dataset.view === "two" : wide.matches);
  const show = () => { view.textContent = isSplit() ? "One column" : "Side by side"; };
  wide.addEventListener("change", show);
  show();
  view.onclick = () => {
    root.dataset.view = isSplit() ? "one" : "two";
    kept("view", root.dataset.view);
    show();
  };
  fold.onclick = () => {
    const open = fold.getAttribute("aria-pressed") !== "true";
    document.querySelectorAll(".diff details").forEach((part) => { part.open = open; });
    fold.setAttribute("aria-pressed", open);
    fold.textContent = open ? "Fold again" : "Unfold all";
  };
  const hunks = [...document.querySelectorAll(".hunk")];
  const go = (by) => {
    const shown = hunks.filter((hunk) => !hunk.closest("details:not([open])"));
    const at = shown.map((hunk) => hunk.getBoundingClientRect().top - 110);
    const next = by > 0 ? at.findIndex((y) => y > 4) : at.findLastIndex((y) => y < -4);
    if (next >= 0) scrollBy(0, at[next]);
  };
  switches.querySelectorAll("[data-go]").forEach((b) => { b.onclick = () => go(Number(b.dataset.go)); });
  return { j: () => go(1), k: () => go(-1), u: () => fold.click(), s: () => view.click() };
}

function setUpKeys(more) {
  const turn = (rel) => () => document.querySelector(`.turn [rel=${rel}]`)?.click();
  const keys = { "/": () => document.querySelector("[type=search]").focus(), "[": turn("prev"), "]": turn("next"), ...more };
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });
}

function openAddressed() { // a line in a fold: unfold it
  const part = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const fold = part?.closest("details:not([open])");
  if (!fold) return;
  fold.open = true;
  part.scrollIntoView({ block: "center" });
}

function setUpContents() { // open beside the text, closed above it
  const contents = document.querySelector(".contents");
  const wide = matchMedia("(min-width: 64rem)");
  if (!contents) return;
  const fit = () => { contents.open = wide.matches; };
  wide.addEventListener("change", fit);
  fit();
}

function setUpCompare() {
  const form = document.getElementById("pick");
  if (!form) return;
  const names = [...form.a.options].map((option) => option.value);
  form.hidden = false;
  form.onsubmit = (event) => {
    event.preventDefault();
    const [a, b] = [form.a.selectedIndex, form.b.selectedIndex].sort((x, y) => x - y);
    if (a === b) form.querySelector("[role=status]").textContent = "These are one and the same.";
    else location.href = `diff/${names[a]}-${names[b]}.html`;
  };
}

function find(query) { // entries that hold all words, the best first
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return [];
  const rank = (entry) => {
    entry.title ??= entry.t.toLowerCase();
    entry.text ??= entry.x.toLowerCase();
    let points = { concept: 30, log: 12, code: 4 }[entry.k] ?? 0;
    for (const word of words) {
      const inText = entry.text.split(word).length - 1;
      if (!inText && !entry.title.includes(word)) return 0;
      points += Math.min(inText, 8) + (entry.title === word ? 60 : entry.title.includes(word) ? 20 : 0);
    }
    return points + (entry.text.includes(words.join(" ")) ? 5 : 0);
  };
  return INDEX.map((entry) => [rank(entry), entry]).filter(([points]) => points).sort((a, b) => b[0] - a[0])
    .map(([, entry]) => entry);
}

function setUpSearch() {
  const form = document.getElementById("search");
  if (!form || typeof INDEX === "undefined") return;
  const [list, count] = [document.getElementById("found"), document.getElementById("count")];
  const excerpt = (entry, words) => {
    const phrase = entry.text.indexOf(words.join(" "));
    const at = phrase >= 0 ? phrase : Math.min(...words.map((w) => entry.text.indexOf(w)).filter((i) => i >= 0));
    const begin = at === Infinity ? 0 : Math.max(0, at - 60);
    const part = document.createElement("p");
    const text = (begin ? "… " : "") + entry.x.slice(begin, begin + 220) + (entry.x.length > begin + 220 ? " …" : "");
    const either = new RegExp(`(${words.map((w) => w.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|")})`, "gi");
    text.split(either).forEach((piece, i) => {
      const node = i % 2 ? document.createElement("mark") : document.createTextNode(piece);
      if (i % 2) node.textContent = piece;
      part.append(node);
    });
    return part;
  };
  const show = () => {
    const query = form.q.value.trim();
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    const found = find(query);
    list.replaceChildren(...found.slice(0, 40).map((entry) => {
      const item = document.createElement("li");
      const link = Object.assign(document.createElement("a"), { href: entry.u, textContent: entry.t });
      const where = document.createElement("span");
      where.textContent = entry.w + (entry.a ? `, the same in ${entry.a} more` : "");
      item.append(link, where, excerpt(entry, words));
      return item;
    }));
    count.textContent = !query ? "" : !found.length ? "Nothing found."
      : `${found.length} ${found.length === 1 ? "place" : "places"}${found.length > 40 ? ", the best 40" : ""}`;
  };
  form.q.value = new URLSearchParams(location.search).get("q") || "";
  form.q.oninput = show;
  form.onsubmit = (event) => { event.preventDefault(); show(); };
  form.q.focus();
  show();
}

addEventListener("hashchange", openAddressed);
addEventListener("DOMContentLoaded", () => {
  setUpTheme();
  setUpKeys(setUpDiff());
  setUpContents();
  setUpCompare();
  setUpSearch();
  openAddressed();
});
