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
  const bar = document.querySelector(".bar");
  const counter = document.getElementById("at-change");
  const shown = () => hunks.filter((hunk) => !hunk.closest("details:not([open])"));
  const distance = (hunk) => hunk.getBoundingClientRect().top - bar.offsetHeight - 24; // to its place below the bar
  let current = null;
  let going = false;
  const mark = (hunk) => {
    const all = shown();
    const at = all.indexOf(hunk);
    current?.classList.remove("now");
    current = at >= 0 ? hunk : null;
    current?.classList.add("now");
    const place = at >= 0 ? `${at + 1} of ${all.length}` : `${all.length}`;
    counter.textContent = at >= 0 ? `change ${place}` : `${place} ${all.length === 1 ? "change" : "changes"}`;
  };
  const follow = () => {
    if (!going) mark(shown().findLast((hunk) => distance(hunk) < 4));
    going = false;
  };
  const go = (by) => { // also to the last changes, which the end of the page keeps from their place
    const all = shown();
    const at = all.indexOf(current);
    const within = by < 0 && current && distance(current) < -4;
    const next = all[within ? at : at + by];
    if (!next) return;
    mark(next);
    const before = scrollY;
    scrollBy(0, distance(next));
    going = scrollY !== before;
  };
  addEventListener("scroll", follow, { passive: true });
  document.querySelectorAll(".diff details").forEach((part) => { part.addEventListener("toggle", follow); });
  follow();
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
  const said = form.querySelector("[role=status]");
  const isOne = () => form.a.selectedIndex === form.b.selectedIndex;
  form.onchange = () => { said.textContent = isOne() ? `${form.a.value} twice: choose two that differ.` : ""; };
  form.onsubmit = (event) => {
    event.preventDefault();
    const [a, b] = [form.a.selectedIndex, form.b.selectedIndex].sort((x, y) => x - y);
    if (isOne()) form.onchange();
    else location.href = `diff/${names[a]}-${names[b]}.html`;
  };
}

function setUpPrint() { // paper has no folds; the long ones of a diff stay, it says what they hold
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("article details:not([open]), .samples details:not([open])")];
    opened.forEach((part) => { part.open = true; });
  });
  addEventListener("afterprint", () => { opened.forEach((part) => { part.open = false; }); });
}

const COMMON = new Set(("a about an and are as at be but by can do does for from has have how i if in is it its me my of on "
  + "or so than that the their then there these they this to was we what when where which who why will with you your").split(" "));

function wordsOf(text) {
  return text.toLowerCase().split(/\s+/).filter(Boolean);
}

function find(query) { // [words, entries that hold them, the best first, whether each holds all]
  const exact = wordsOf(query);
  const bare = exact.map((word) => word.replace(/^["'(]+|["'),.:;?!]+$/g, "")).filter(Boolean);
  const telling = bare.filter((word) => !COMMON.has(word));
  for (const words of [exact, telling]) {
    const found = rank(words, true);
    if (found.length) return [words, found, true];
  }
  return [telling, rank(telling, false), false];
}

function rank(words, all) {
  if (!words.length) return [];
  for (const entry of INDEX) {
    entry.title ??= entry.t.toLowerCase();
    entry.text ??= entry.x.toLowerCase();
  }
  const holds = (entry, word) => entry.title.includes(word) || entry.text.includes(word);
  const rare = words.map((word) => INDEX.length / (1 + INDEX.filter((entry) => holds(entry, word)).length));
  const points = (entry) => {
    const held = words.filter((word) => holds(entry, word));
    if (all ? held.length < words.length : !held.length) return 0;
    let sum = { concept: 30, log: 12, code: 4 }[entry.k] ?? 0;
    for (const word of held) {
      sum += Math.min(entry.text.split(word).length - 1, 8);
      sum += entry.title === word ? 60 : entry.title.includes(word) ? 20 : 0;
      if (!all) sum += 30 * Math.log(1 + rare[words.indexOf(word)]);
    }
    return sum + (entry.text.includes(words.join(" ")) ? 5 : 0);
  };
  return INDEX.map((entry) => [points(entry), entry]).filter(([sum]) => sum).sort((a, b) => b[0] - a[0])
    .map(([, entry]) => entry);
}

function setUpSearch() {
  const form = document.getElementById("search");
  if (!form || typeof INDEX === "undefined") return;
  const [list, count] = [document.getElementById("found"), document.getElementById("count")];
  const nothing = document.getElementById("nothing");
  const isCode = (entry) => entry.w.endsWith(".py");
  const excerpt = (entry, words) => {
    const phrase = entry.text.indexOf(words.join(" "));
    const at = phrase >= 0 ? phrase : Math.min(...words.map((w) => entry.text.indexOf(w)).filter((i) => i >= 0));
    let begin = at === Infinity ? 0 : Math.max(0, at - 60);
    if (isCode(entry)) begin = entry.x.lastIndexOf("\n", begin) + 1; // a whole line, with its indentation
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
    const [words, found, all] = find(query);
    list.replaceChildren(...found.slice(0, 40).map((entry) => {
      const item = document.createElement("li");
      const link = Object.assign(document.createElement("a"), { href: entry.u, textContent: entry.t });
      const where = document.createElement("span");
      where.textContent = entry.w + (entry.a ? `, the same in ${entry.a} more` : "");
      if (isCode(entry)) item.className = "mono";
      item.append(link, where, excerpt(entry, words));
      return item;
    }));
    nothing.hidden = !query || found.length > 0;
    const some = all ? "" : "Nowhere do all words stand together. Some of them: ";
    count.textContent = !query ? "" : !found.length ? "Nothing found."
      : `${some}${found.length} ${found.length === 1 ? "place" : "places"}${found.length > 40 ? ", the best 40" : ""}`;
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
  setUpPrint();
  setUpSearch();
  openAddressed();
});
