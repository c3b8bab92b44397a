// Where everything meets: the address, the keys, the theme, the stream of jobs, and the token where one is wanted.

import { follow, getJson, postJson, Refusal } from "/page/api.js";
import { compareView } from "/page/compare.js";
import { make, problem, tip } from "/page/dom.js";
import { jobsView } from "/page/jobs.js";
import { runView } from "/page/run.js";
import { runsView } from "/page/runs.js";

const main = document.getElementById("main"), jobs = new Map();
let view = {}, turn = 0;

function read() {
  const [path, query = ""] = location.hash.replace(/^#/, "").split("?"), [, kind = "", name = ""] = path.match(/^\/([a-z]*)\/?(.*)$/) || [];
  return { kind: kind || "runs", name: decodeURIComponent(name), places: Object.fromEntries(new URLSearchParams(query)) };
}

// Write the places of a view into the address; replaceState fires no hashchange, so nothing is drawn anew.
function go(places) {
  const there = Object.entries(places).filter(([, value]) => value != null), path = location.hash.split("?")[0];
  history.replaceState(null, "", `${path}?${new URLSearchParams(there)}`);
}

async function draw() {
  const mine = ++turn, { kind, name, places } = read();
  view = {}; // the view that is left takes no more keys, and so writes no more addresses
  tip(null, "");
  for (const link of document.querySelectorAll("nav [data-view]")) link.classList.toggle("here", link.dataset.view === kind || (kind === "run" && link.dataset.view === "runs"));
  document.title = name ? `${name} · Headwater` : "Headwater";
  const box = make("div");
  main.replaceChildren(box);
  try {
    const made = kind === "run" ? runView(box, name, places, go) : kind === "jobs" ? jobsView(box, jobs)
      : kind === "compare" ? compareView(box, places, go) : runsView(box, jobs);
    const found = await made;
    if (mine === turn) view = found;
  } catch (error) {
    if (mine === turn) box.replaceChildren(error instanceof Refusal && error.status === 401 ? login() : problem(error));
  }
}

function login() {
  const input = make("input", { type: "password", autocomplete: "current-password", "aria-label": "token" }), said = make("div");
  const enter = async (event) => {
    event.preventDefault();
    try {
      await postJson("/login", { token: input.value.trim() });
      start();
    } catch (error) {
      said.replaceChildren(problem(error));
    }
  };
  return make("form", { class: "card", onsubmit: enter }, make("h1", {}, "This server wants its token"), make("div", { class: "row" }, input, make("button", { class: "main" }, "Enter")), said);
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("theme", theme);
}

function showActive() {
  const n = [...jobs.values()].filter((job) => job.state === "queued" || job.state === "running").length, box = document.getElementById("active");
  box.hidden = !n;
  box.textContent = n;
}

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const keys = document.getElementById("keys"), places = { r: "#/", b: "#/jobs", c: "#/compare" };
  if (event.key === "?") keys.open ? keys.close() : keys.showModal();
  else if (view.key?.(event.key)) { /* the view took it */ }
  else if (event.key in places) location.hash = places[event.key];
  else if (event.key === "t") document.getElementById("theme").click();
  else return;
  event.preventDefault();
}

async function start() {
  await draw();
  let first;
  try {
    first = await getJson("/jobs");
  } catch {
    return;
  }
  for (const job of first.jobs) jobs.set(job.id, job);
  showActive();
  view.onJob?.();
  const live = document.getElementById("live");
  follow(first.clock, (job) => {
    jobs.set(job.id, job);
    showActive();
    view.onJob?.(job);
  }, (on) => { live.className = on ? "on" : "off"; });
}

setTheme(localStorage.getItem("theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
document.getElementById("theme").addEventListener("click", () => {
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  draw();
});
document.getElementById("help").addEventListener("click", () => document.getElementById("keys").showModal());
addEventListener("keydown", pressed);
addEventListener("hashchange", draw);
start();
