// What is shown stands in the address, so that a reload, a link or the back button finds it again.

const VIEWS = [
  ["overview", "Overview"],
  ["rollouts", "Rollouts"],
  ["tokens", "Tokens"],
  ["health", "Health"],
];
const NUMERIC = new Set(["run", "from", "to", "item", "token", "trained", "stretch"]);
const QUIET_MS = 4000; // a page in use is not loaded again under the reader's hand

let data = null;
let state = {};
let paused = false;
let lastUse = 0;

function readAddress() {
  const found = { view: "overview" };
  for (const [key, value] of new URLSearchParams(location.hash.slice(1))) found[key] = NUMERIC.has(key) ? Number(value) : value;
  if (!VIEWS.some(([view]) => view === found.view)) found.view = "overview";
  return found;
}

function address(next) {
  const known = Object.entries(next).filter(([, value]) => value !== undefined && value !== "");
  return `#${new URLSearchParams(known)}`;
}

/** Keeps a change in the address without drawing anything. */
function remember(patch) {
  state = { ...state, ...patch };
  history.replaceState({ y: scrollY }, "", address(state));
}

/** Changes what is shown. */
function go(patch) {
  const next = { ...state, ...patch };
  const sameView = next.view === state.view;
  history[sameView ? "replaceState" : "pushState"]({ y: 0 }, "", address(next));
  state = next;
  if (sameView && state.view === "rollouts" && !("from" in patch && "to" in patch)) showRollouts(data, state);
  else show(sameView ? scrollY : 0);
}

async function show(y = 0) {
  clearPlots();
  shown = null;
  const main = document.getElementById("main");
  main.replaceChildren();
  main.dataset.view = state.view;
  document.querySelectorAll("#nav button").forEach((button) => {
    if (button.dataset.view === state.view) button.setAttribute("aria-current", "page");
    else button.removeAttribute("aria-current");
  });
  await { overview, rollouts, tokens: tokensView, health }[state.view](main, data, state);
  scrollTo(0, y);
  main.dataset.ready = state.view;
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  plots.forEach((plot) => plot.redraw());
}

function toggleTheme() {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  remember({ theme });
  setTheme(theme);
  show(scrollY);
}

/** Goes to the next or previous answer of those that pass the filters. */
function step(by) {
  const items = filtered(data, state);
  const now = state.item ?? shown?.item.index ?? items[0]?.index;
  const place = items.findIndex((item) => item.index === now);
  const next = items[place < 0 ? 0 : Math.min(items.length - 1, Math.max(0, place + by))];
  if (next) go({ item: next.index, token: undefined });
}

function chosenItem() {
  return state.item ?? filtered(data, state)[0]?.index;
}

const KEYS = {
  1: () => go({ view: "overview" }),
  2: () => go({ view: "rollouts" }),
  3: () => go({ view: "tokens" }),
  4: () => go({ view: "health" }),
  j: () => ["rollouts", "tokens"].includes(state.view) && step(1),
  k: () => ["rollouts", "tokens"].includes(state.view) && step(-1),
  b: () => shown?.fall && pointAt(shown.fall.index, { scroll: true, save: true }),
  ArrowRight: () => shown && pointAt(shown.at === null ? 0 : shown.at + 1, { save: true }),
  ArrowLeft: () => shown && pointAt(Math.max(0, (shown.at ?? 1) - 1), { save: true }),
  Enter: () => state.view === "rollouts" && go({ view: "tokens", item: chosenItem(), token: undefined }),
  Escape: () => state.view === "tokens" && go({ view: "rollouts" }),
  "/": () => {
    if (state.view !== "rollouts") go({ view: "rollouts" });
    document.getElementById("f-text").focus();
  },
  d: toggleTheme,
  "?": () => document.getElementById("keys").showModal(),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.getElementById("keys").open) return;
  const inside = event.target;
  if (inside.matches("input, select")) {
    if (event.key === "Escape") inside.blur();
    return;
  }
  if (event.key === "Enter" && inside.matches("button:not(.row)")) return;
  const act = KEYS[event.key];
  if (!act) return;
  event.preventDefault();
  act();
}

/** Loads the page again while the run goes on, at the same view and height, but not under a hand. */
function keepUp() {
  const button = document.getElementById("pause");
  button.hidden = false;
  const label = () => (button.textContent = paused ? "Follow" : "Pause");
  button.onclick = () => {
    paused = !paused;
    label();
  };
  label();
  for (const kind of ["pointermove", "keydown", "wheel"]) addEventListener(kind, () => (lastUse = Date.now()), { passive: true });
  setInterval(() => {
    if (paused || Date.now() - lastUse < QUIET_MS) return;
    history.replaceState({ y: scrollY }, "", location.hash);
    location.reload();
  }, 1000 * data.refresh_s);
}

function nameRuns() {
  const twice = new Set(data.runs.map((run) => run.name)).size < data.runs.length;
  data.runs.forEach((run) => (run.label = twice ? run.folder : run.name));
  document.getElementById("run-name").textContent = data.runs.map((run) => run.label).join(", ");
  const live = data.runs.some((run) => !run.finished);
  document.getElementById("run-state").textContent =
    `${live ? "still running" : "finished"}, written ${data.written}${data.iteration === null ? "" : `, answers of iteration ${data.iteration}`}`;
}

async function start() {
  state = readAddress();
  setTheme(state.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
  data = await openData();
  nameRuns();
  document
    .getElementById("nav")
    .append(
      ...VIEWS.map(([view, name], i) =>
        el("button", {
          type: "button",
          textContent: name,
          title: `Key ${i + 1}`,
          "data-view": view,
          onclick: () => go({ view }),
        }),
      ),
    );
  document.getElementById("theme").onclick = toggleTheme;
  document.getElementById("help").onclick = KEYS["?"];
  addEventListener("keydown", onKey);
  addEventListener("popstate", (event) => {
    state = readAddress();
    show(event.state?.y ?? 0);
  });
  addEventListener("resize", fitPlots);
  history.scrollRestoration = "manual";
  await show(history.state?.y ?? 0);
  if (data.refresh_s) keepUp();
  document.documentElement.dataset.opened = String(Math.round(performance.now()));
}

start().catch((error) => {
  document
    .getElementById("main")
    .replaceChildren(
      el("p", {
        className: "note",
        textContent: `This page cannot be shown: ${error.message}. It needs Chromium, Firefox or Safari of 2023 or newer.`,
      }),
    );
  throw error;
});
