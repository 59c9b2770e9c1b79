"use strict";
// Search within a part of the page: [data-search] has an input, perhaps a select, an output, and .item elements.
// What is found is marked by the browser's highlights, which leave the page's elements as they are.
const MOST = 5000; // marks
const marks = typeof Highlight === "undefined" ? null : new Highlight();
if (marks) CSS.highlights.set("found", marks);

function textNodes(item) {
  const walker = document.createTreeWalker(item, NodeFilter.SHOW_TEXT);
  const nodes = [];
  let text = "";
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    nodes.push([text.length, node]);
    text += node.data;
  }
  const lower = text.toLowerCase();
  return { nodes, text: lower.length === text.length ? lower : text }; // a few letters become two when they are lowered
}

function places(text, wanted) {
  const found = [];
  for (let at = text.indexOf(wanted); at >= 0 && found.length < MOST; at = text.indexOf(wanted, at + wanted.length)) found.push(at);
  return found;
}

function rangeOf(nodes, start, stop) {
  const range = document.createRange();
  const last = (at) => nodes.reduce((best, pair) => (pair[0] <= at ? pair : best), nodes[0]);
  const [first, end] = [last(start), last(stop - 1)];
  range.setStart(first[1], start - first[0]);
  range.setEnd(end[1], stop - end[0]);
  return range;
}

for (const part of document.querySelectorAll("[data-search]")) {
  const input = part.querySelector("input[type=search]");
  const select = part.querySelector("select");
  const output = part.querySelector("output");
  const items = [...part.querySelectorAll(".item")].map((element) => ({ element, ...textNodes(element) }));
  const groups = [...part.querySelectorAll(".group")];
  let ranges = [];
  let next = 0;

  function search() {
    const wanted = input.value.toLowerCase();
    const source = select ? select.value : "";
    let shown = 0;
    let hits = 0;
    for (const range of ranges) marks?.delete(range);
    ranges = [];
    next = 0;
    for (const { element, nodes, text } of items) {
      const found = wanted ? places(text, wanted) : [];
      const isShown = (!wanted || found.length > 0) && (!source || element.dataset.source === source);
      element.hidden = !isShown;
      if (!isShown) continue;
      shown += 1;
      hits += found.length;
      for (const at of found) if (ranges.length < MOST) ranges.push(rangeOf(nodes, at, at + wanted.length));
    }
    for (const range of ranges) marks?.add(range);
    for (const group of groups) group.hidden = (wanted || source) && !group.querySelector(".item:not([hidden])");
    const of = `${shown.toLocaleString("en")} of ${items.length.toLocaleString("en")} ${part.dataset.search}`;
    output.textContent = wanted ? `${hits.toLocaleString("en")} found in ${of}` : of;
  }

  input.addEventListener("input", search);
  select?.addEventListener("change", search);
  input.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      input.value = "";
      search();
    }
    if (event.key !== "Enter" || !ranges.length) return;
    const place = ranges[next % ranges.length].startContainer.parentElement;
    next += 1;
    place.scrollIntoView({ block: "center" });
  });
  search();
}

document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target.matches("input, select, textarea")) return;
  event.preventDefault();
  document.querySelector("input[type=search]")?.focus();
});

// A long box is opened where it tells most: at the answer in its evidence, at what is trained after a long prompt.
for (const text of document.querySelectorAll(".segment > .text")) {
  const trained = text.querySelector(".w");
  if (trained && trained.offsetTop > text.clientHeight) text.scrollTop = trained.offsetTop - text.clientHeight / 2;
}
for (const evidence of document.querySelectorAll(".evidence")) {
  const mark = evidence.querySelector("mark") ?? evidence.querySelector(".chunk");
  if (mark) evidence.scrollTop = mark.offsetTop - evidence.clientHeight / 3;
}
