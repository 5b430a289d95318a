// The page of the cockpit. It reports which keys are held and shows what the server sends; it decides nothing.

const $ = (id) => document.getElementById(id);
const LABELS = {
  base: ["Base", "The policy alone: your keys only say when it moves."],
  direct: ["Direct", "Your key press itself is executed, wherever it leads."],
  partial: ["Partial", "Your key press is noised to the level \u03c4 and denoised from there."],
  rank: ["Rank", "Of many samples of the policy, the one nearest to your key press is executed."],
  frs: ["FRS", "Your key press runs back through the flow to its noise, and forward to what the policy would do of that kind."],
  dsbc: ["Noise policy", "What was learned here drives. Press keys to help: that is recorded as a correction (DAgger)."],
  guided: ["Guided", "As FRS, and a critic's gradient guides the flow on its way."],
};
const PILOTS = { "": "stand still", policy: "the policy drives", script: "a script drives", vlm: "a VLM drives" };
const KEYS = {
  ArrowLeft: "left", ArrowRight: "right", ArrowUp: "away", ArrowDown: "nearer",
  KeyW: "up", KeyS: "down", PageUp: "up", PageDown: "down", KeyE: "policy",
};
const REPORT_EVERY = 100; // milliseconds; reports are what keeps the robot moving

const token = new URLSearchParams(location.hash.slice(1)).get("token") ?? sessionStorage.getItem("token");
if (token) { sessionStorage.setItem("token", token); history.replaceState(null, "", location.pathname); }
let client = sessionStorage.getItem("client");
if (!client) {
  client = Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  sessionStorage.setItem("client", client);
}

let socket = null;
let retry = 500;
let gone = false;
let state = null;
let seat = { role: "viewer", free: false, people: 0 };
let sequence = 0;
let tapping = false;
let less = false;
let shownNote = 0;
let arriving = true;
const held = new Set();      // by keyboard and buttons
let padded = new Set();      // by gamepad
const drawn = [];            // times of the last pictures

// Connection

function connect() {
  socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/drive`);
  socket.binaryType = "arraybuffer";
  socket.onopen = () => {
    retry = 500;
    socket.send(JSON.stringify({ type: "hello", client, token, watch: location.search.includes("watch") }));
    $("curtain").hidden = true;
    arriving = true;
    shownNote = 0; // a server that was started anew counts from one
    $("notes").replaceChildren();
  };
  socket.onmessage = ({ data }) => (typeof data === "string" ? hear(JSON.parse(data)) : picture(data));
  socket.onclose = ({ code, reason }) => {
    letGo();
    const refused = code === 1008 && reason.includes("token");
    $("curtain-text").textContent = refused
      ? "This cockpit asks for a token. Open the whole address that the terminal shows."
      : "The connection is lost. The robot stands still; trying to come back\u2026";
    $("curtain").hidden = false;
    if (!refused && !gone) setTimeout(connect, (retry = Math.min(retry * 1.6, 5000)));
  };
}

function say(message) {
  if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
}

function hear(message) {
  if (message.type === "state") show(message.state);
  else if (message.type === "seat") { seat = message; showSeat(); }
  else if (message.type === "error") note(message.text, "error");
}

// Driving

const drives = () => seat.role === "driver";
const wanted = () => [...new Set([...held, ...padded])];

function report() {
  if (!drives()) return;
  if (document.hidden) return; // silence stops the robot
  say({ type: "report", held: tapping ? [] : wanted(), less, sequence });
}

function press(way) {
  if (!drives() || held.has(way)) return;
  held.add(way);
  sequence += 1;
  if (state?.state === "paused") command("resume");
  if (tapping) say({ type: "tap", held: [way], less, sequence });
  else report();
  light();
}

function release(way) {
  if (!held.delete(way)) return;
  report();
  light();
}

function letGo() { held.clear(); padded = new Set(); light(); }

function light() {
  const all = wanted();
  for (const button of document.querySelectorAll("[data-way]")) button.classList.toggle("on", all.includes(button.dataset.way));
}

function command(name) { if (drives()) say({ type: "command", name }); }
function choose(change) { if (drives()) say({ type: "choose", ...change }); }
function grip(what) {
  if (!drives()) return;
  if (state?.state === "paused") command("resume");
  sequence += 1;
  say({ type: "grip", command: what, sequence });
}
const toggleGripper = () => grip(state?.gripper === "close" ? "open" : "close");
function nextTask() {
  if (!state || !drives()) return;
  const index = state.tasks.indexOf(state.env);
  say({ type: "task", env: state.tasks[(index + 1) % state.tasks.length] });
}
const togglePause = () => command(state?.state === "driving" ? "pause" : "resume");
const togglePilot = () => choose({ pilot: state?.pilot ? "" : "policy" });

addEventListener("keydown", (event) => {
  if ($("help").open || event.ctrlKey || event.metaKey || event.altKey) return;
  less = event.shiftKey;
  const typing = event.target.matches?.("select, input");
  const way = KEYS[event.code];
  if (way && !(typing && event.code.startsWith("Arrow"))) {
    event.preventDefault();
    if (!event.repeat) press(way);
    return;
  }
  if (event.repeat) return;
  if (event.code === "Space" && !event.target.matches?.("button:focus-visible, select")) { event.preventDefault(); toggleGripper(); return; }
  const digit = /^Digit([1-7])$/.exec(event.code);
  if (digit && !typing) { choose({ method: Object.keys(LABELS)[digit[1] - 1] }); return; }
  const act = {
    KeyG: () => grip("policy"), KeyA: togglePilot, KeyP: togglePause, KeyR: () => command("reset"), KeyN: nextTask,
    KeyK: () => command("keep"), KeyX: () => command("discard"), KeyT: () => command("train"), KeyF: () => command("film"),
  }[event.code];
  if (event.code === "Escape") document.activeElement?.blur(); // back from Tab to the driving keys
  else if (act && !typing) act();
  else if (event.key === "?") $("help").showModal();
});
addEventListener("keyup", (event) => { less = event.shiftKey; const way = KEYS[event.code]; if (way) release(way); });
addEventListener("blur", () => { letGo(); report(); });
document.addEventListener("visibilitychange", () => { if (document.hidden) { letGo(); command("pause"); } });
// A page on its way out must not come back for the wheel; one that is brought back by "back" does.
addEventListener("pagehide", () => { gone = true; socket?.close(); });
addEventListener("pageshow", ({ persisted }) => { if (persisted && gone) { gone = false; connect(); } });

for (const button of document.querySelectorAll("[data-way]")) {
  const way = button.dataset.way;
  button.addEventListener("pointerdown", (event) => { event.preventDefault(); button.setPointerCapture(event.pointerId); press(way); });
  for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) button.addEventListener(end, () => release(way));
  button.addEventListener("contextmenu", (event) => event.preventDefault());
  button.addEventListener("keydown", (event) => { if (event.key === "Enter" && !event.repeat) press(way); });
  button.addEventListener("keyup", (event) => { if (event.key === "Enter") release(way); });
}
// A button that was clicked gives the keyboard back, or Space would press it again; one that was reached by Tab keeps it.
document.addEventListener("click", (event) => { if (event.detail > 0) event.target.closest?.("button")?.blur(); });
for (const [id, act] of Object.entries({
  gripper: toggleGripper, pause: togglePause, reset: () => command("reset"), keep: () => command("keep"), discard: () => command("discard"),
  restart: () => command("restart"), next: nextTask, train: () => command("train"), "stop-training": () => command("stop_training"),
  film: () => command("film"), "help-button": () => $("help").showModal(),
  hold: () => mode(false), tap: () => mode(true),
  use: () => choose({ method: "dsbc", noise_policy: state.training.name, pilot: "policy" }),
  "seat-button": () => say({ type: "seat", take: !drives() }),
})) $(id).addEventListener("click", act);

function mode(tap) {
  tapping = tap;
  $("hold").setAttribute("aria-checked", String(!tap));
  $("tap").setAttribute("aria-checked", String(tap));
}

$("task").addEventListener("change", () => { say({ type: "task", env: $("task").value }); $("task").blur(); });
$("pilot").addEventListener("change", () => { choose({ pilot: $("pilot").value }); $("pilot").blur(); });
$("noise-policy").addEventListener("change", () => { choose({ noise_policy: $("noise-policy").value }); $("noise-policy").blur(); });
for (const name of ["reversal_steps", "magnitude", "tau", "candidates"]) {
  $(name).addEventListener("input", () => { $(name).nextElementSibling.value = $(name).value; });
  $(name).addEventListener("change", () => { choose({ [name]: Number($(name).value) }); $(name).blur(); });
}

// Gamepad: sticks move, lower triggers go down and up, A grips, B lets the policy decide, Start pauses
const pressedBefore = {};
function gamepad() {
  const pad = [...(navigator.getGamepads?.() ?? [])].find(Boolean);
  const now = new Set();
  if (pad) {
    const far = 0.45;
    if (pad.axes[0] < -far) now.add("left");
    if (pad.axes[0] > far) now.add("right");
    if (pad.axes[1] < -far) now.add("away");
    if (pad.axes[1] > far) now.add("nearer");
    if ((pad.axes[3] ?? 0) < -far || pad.buttons[7]?.pressed) now.add("up");
    if ((pad.axes[3] ?? 0) > far || pad.buttons[6]?.pressed) now.add("down");
    if (pad.buttons[1]?.pressed) now.add("policy");
    for (const [index, act] of [[0, toggleGripper], [9, togglePause]]) {
      const is = Boolean(pad.buttons[index]?.pressed);
      if (is && !pressedBefore[index]) act();
      pressedBefore[index] = is;
    }
  }
  if (now.size !== padded.size || [...now].some((way) => !padded.has(way))) {
    padded = now;
    sequence += 1;
    if (now.size && state?.state === "paused") command("resume");
    report();
    light();
  }
}
setInterval(() => { gamepad(); report(); }, REPORT_EVERY);

// The picture

async function picture(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const about = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const image = await createImageBitmap(new Blob([new Uint8Array(buffer, 4 + length)], { type: "image/jpeg" }));
  const canvas = $("picture");
  if (canvas.width !== image.width) { canvas.width = image.width; canvas.height = image.height; }
  canvas.getContext("2d").drawImage(image, 0, 0);
  image.close();
  overlay(about.overlay);
  say({ type: "seen", frame: about.frame });
  canvas.dataset.frame = about.frame;
  canvas.dataset.sequence = about.sequence;
  canvas.dataset.step = about.step;
  const now = performance.now();
  drawn.push(now);
  while (drawn.length && drawn[0] < now - 2000) drawn.shift();
}

const point = ([x, y]) => `${(x * 1000).toFixed(1)},${(y * 1000).toFixed(1)}`;
function overlay(about) {
  const svg = $("overlay");
  svg.replaceChildren();
  const line = (path, kind) => {
    if (path.length < 2) return;
    const element = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
    element.setAttribute("points", path.map(point).join(" "));
    element.setAttribute("class", kind);
    svg.append(element);
  };
  const dot = ([x, y], radius, kind) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", "circle");
    element.setAttribute("cx", x * 1000);
    element.setAttribute("cy", y * 1000);
    element.setAttribute("r", radius);
    element.setAttribute("class", kind);
    svg.append(element);
  };
  for (const path of about.fan ?? []) line(path, "fan");
  for (const path of about.reference ?? []) { line(path, "reference-path"); if (path.length) dot(path.at(-1), 11, "reference-head"); }
  for (const path of about.chunk ?? []) { line(path, "chunk-path"); if (path.length) dot(path.at(-1), 13, "chunk-head"); }
  if (about.gripper?.every((value) => value !== null)) dot(about.gripper, 7, "gripper-dot");
  $("agreement").textContent = about.agreement == null ? "" : about.agreement < 0 ? "goes its own way" : `follows you ${Math.round(100 * about.agreement)}%`;
}

// Everything else

function show(next) {
  const before = state;
  state = next;
  const { episode } = state;
  if (before?.env !== state.env || !$("task").options.length) {
    options($("task"), state.tasks.map((name) => [name, name.split("/").pop()]), state.env);
    $("sentence").textContent = state.task;
    document.title = `${state.env.split("/").pop()} \u2013 Counterflow cockpit`;
  }
  $("stage").classList.toggle("still", state.state !== "driving");
  $("stage").dataset.state = state.state;
  const pill = $("state");
  const waits = state.state === "driving" && !state.moving && !state.pilot && !wanted().length;
  pill.textContent = waits && drives() ? "your turn: hold a key" : { driving: "driving", paused: "paused", finished: "over", failed: "simulator failed" }[state.state];
  pill.className = `pill ${waits ? "" : { driving: "go", failed: "bad", finished: episode.success ? "good" : "" }[state.state] ?? ""}`;
  $("method-pill").textContent = `${LABELS[state.method][0]}${state.method === "frs" ? ` \u00b7 K ${state.settings.reversal_steps}` : ""}${state.pilot ? ` \u00b7 ${PILOTS[state.pilot] ?? state.pilot}${state.thinking ? " is thinking" : ""}` : ""}`;
  $("clock").textContent = `${(episode.step / state.rate).toFixed(1)} s of ${(episode.max_steps / state.rate).toFixed(0)} \u00b7 episode ${episode.index + 1}`;
  $("timeline").style.width = `${(100 * episode.step) / episode.max_steps}%`;
  showBanner(episode);
  $("pause").querySelector("span").textContent = state.state === "driving" ? "Pause" : "Go on";
  $("pause").hidden = state.state === "finished" || state.state === "failed";
  const undecided = state.state === "finished" && episode.kept === "";
  $("keep").hidden = !undecided || !state.keeps;
  $("discard").hidden = !undecided;
  $("restart").hidden = state.state !== "failed";
  $("gripper-state").textContent = state.gripper;
  showMethods();
  for (const name of ["reversal_steps", "magnitude", "tau", "candidates"]) {
    const input = $(name);
    if (document.activeElement !== input) { input.value = state.settings[name]; input.nextElementSibling.value = state.settings[name]; }
  }
  for (const row of document.querySelectorAll("[data-of]")) row.hidden = row.dataset.of !== state.method;
  for (const name of ["reversal_steps", "magnitude", "tau", "candidates"]) {
    $(name).disabled = !drives() || !state.adjustable.includes(name);
    $(name).title = state.adjustable.includes(name) ? "" : "Set where the policy is served.";
  }
  options($("pilot"), ["", ...state.pilots].map((name) => [name, PILOTS[name] ?? name]), state.pilot);
  $("noise-row").hidden = !state.noise_policies.length;
  options($("noise-policy"), state.noise_policies.map((name) => [name, name]), state.noise_policy);
  showTallies();
  showLearning();
  for (const one of state.notes) if (one.number > shownNote) { shownNote = one.number; note(one.text, one.kind); }
  if (arriving) $("alert").hidden = true; // what was said before this page came is no news
  arriving = false;
}

function options(select, pairs, value) {
  const key = JSON.stringify(pairs);
  if (select.dataset.key !== key) {
    select.dataset.key = key;
    select.replaceChildren(...pairs.map(([name, label]) => new Option(label, name)));
  }
  if (document.activeElement !== select) select.value = value ?? "";
}

function showBanner(episode) {
  const banner = $("banner");
  banner.hidden = !(state.state === "finished" || state.state === "failed" || (state.state === "paused" && state.reason));
  banner.className = "banner";
  if (state.state === "failed") { banner.classList.add("failed"); banner.textContent = `The simulator failed: ${state.reason}`; return; }
  banner.classList.toggle("bad", !(state.state === "finished" && episode.success));
  const kept = { kept: "kept", discarded: "discarded" }[episode.kept];
  const small = document.createElement("small");
  small.textContent = state.state === "paused" ? state.reason : kept ? `${kept}; R begins the next episode` : !state.keeps ? "it can't be kept: the server tells no noises; R begins the next" : "K keeps it, X discards it, R begins the next";
  banner.replaceChildren(state.state === "paused" ? "Paused" : episode.success ? "Success" : "Out of time", small);
}

function showMethods() {
  const box = $("methods");
  if (!box.children.length) {
    for (const { name } of state.methods) {
      const button = document.createElement("button");
      button.textContent = LABELS[name][0];
      button.dataset.method = name;
      button.setAttribute("role", "radio");
      button.addEventListener("click", () => choose({ method: name }));
      box.append(button);
    }
  }
  for (const { name, lacks } of state.methods) {
    const button = box.querySelector(`[data-method="${name}"]`);
    button.setAttribute("aria-checked", String(name === state.method));
    button.disabled = Boolean(lacks) || !drives();
    button.title = lacks || LABELS[name][1];
  }
  const missing = state.methods.filter(({ lacks }) => lacks);
  $("lacking").hidden = !missing.length;
  $("lacking").querySelector("ul").replaceChildren(...missing.map(({ name, lacks }) =>
    Object.assign(document.createElement("li"), { textContent: `${LABELS[name][0]}: ${lacks}.` })));
  $("target").hidden = !state.target;
  $("target").textContent = `At ${state.target}`;
  $("method-about").textContent = LABELS[state.method][1];
}

function showTallies() {
  if (!state.tallies.length) return $("tallies").replaceChildren(Object.assign(document.createElement("p"), { className: "about", textContent: "No episode is over yet." }));
  $("tallies").replaceChildren(...state.tallies.map(({ method, successes, episodes, interval: [low, high] }) => {
    const row = document.createElement("div");
    row.className = "tally";
    row.title = `${successes} of ${episodes}, 95% interval ${Math.round(100 * low)} to ${Math.round(100 * high)}%`;
    const bar = document.createElement("div");
    bar.className = "bar";
    const interval = document.createElement("div");
    interval.className = "interval";
    interval.style.left = `${100 * low}%`;
    interval.style.width = `${100 * (high - low)}%`;
    const mark = document.createElement("div");
    mark.className = "point";
    mark.style.left = `${(100 * successes) / episodes}%`;
    bar.append(interval, mark);
    const name = document.createElement("span");
    name.textContent = { "dsbc+help": "Noise, helped", mixed: "Mixed" }[method] ?? LABELS[method]?.[0] ?? method;
    const count = document.createElement("b");
    count.textContent = `${successes} of ${episodes}`;
    row.append(name, bar, count);
    return row;
  }));
}

function showLearning() {
  const { recordings, corrections } = state.dataset;
  const helped = corrections.episodes ? `; ${corrections.episodes} helped ${corrections.episodes === 1 ? "episode" : "episodes"}` : "";
  $("dataset").textContent = recordings.episodes || corrections.episodes
    ? `${recordings.successes} successes kept (${recordings.episodes} episodes, ${recordings.decisions} decisions)${helped}. Ten successes make a good start.`
    : state.keeps ? "Nothing is kept yet. Drive to a success and keep it." : "This server tells nothing of its noises, so there is nothing to keep or to learn from.";
  const { training } = state;
  const running = training?.state === "running";
  $("training").hidden = !training;
  $("train").disabled = running || !drives() || !(recordings.successes > 0) || !state.keeps;
  $("stop-training").hidden = !running;
  $("use").hidden = training?.state !== "done";
  if (training) {
    const last = training.curve.at(-1);
    $("training-text").textContent = {
      running: last ? `${training.name} (${training.algorithm}): ${training.step} of at most ${training.steps} updates` : `${training.name}: getting ready`,
      done: `${training.name} is ready: ${training.examples} examples${last?.[2] != null ? `, held-out loss ${last[2].toFixed(3)}` : ""}.`,
      failed: training.message, cancelled: training.message,
    }[training.state];
    curve(training.curve);
  }
  const list = $("exports");
  const key = state.exports.join();
  if (list.dataset.key !== key) {
    list.dataset.key = key;
    list.replaceChildren(...state.exports.map((name) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      button.textContent = name;
      button.addEventListener("click", () => download(name));
      item.append(button);
      return item;
    }));
  }
}

async function download(name) {
  const answer = await fetch(`/export/${name.split("/").map(encodeURIComponent).join("/")}`, { headers: token ? { Authorization: `Bearer ${token}` } : {} });
  if (!answer.ok) return note(await answer.text(), "error");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await answer.blob());
  link.download = name.split("/").pop();
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function curve(points) {
  const svg = $("curve");
  svg.replaceChildren();
  if (points.length < 2) return;
  const width = 300, height = 110, left = 30, bottom = 92;
  const most = Math.max(...points.flatMap(([, loss, out]) => [loss, out ?? 0]));
  const x = (step) => left + ((width - left - 6) * step) / points.at(-1)[0];
  const y = (loss) => bottom - ((bottom - 8) * loss) / most;
  const make = (name, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text) element.textContent = text;
    svg.append(element);
  };
  make("line", { x1: left, x2: width - 6, y1: bottom, y2: bottom, stroke: "#E3E7EB" });
  make("text", { x: left - 4, y: 14, "text-anchor": "end" }, most.toFixed(1));
  make("text", { x: left - 4, y: bottom + 3, "text-anchor": "end" }, "0");
  make("text", { x: width - 6, y: height - 4, "text-anchor": "end" }, `${points.at(-1)[0]} updates`);
  for (const [index, colour, label] of [[1, "#8A96A3", "training"], [2, "#C94A06", "held out, best so far"]]) {
    const path = points.filter((one) => one[index] != null).map((one) => `${x(one[0]).toFixed(1)},${y(one[index]).toFixed(1)}`);
    if (!path.length) continue;
    make("polyline", { points: path.join(" "), fill: "none", stroke: colour, "stroke-width": 2 });
    make("text", { x: index === 1 ? left : left + 60, y: height - 4, class: index === 1 ? "training-label" : "held-out-label" }, label);
  }
}

let alerting = 0;
function note(text, kind = "info") {
  if (kind === "error" && state?.state !== "failed") { // that has a banner of its own
    $("alert").textContent = text;
    $("alert").hidden = false;
    clearTimeout(alerting);
    alerting = setTimeout(() => { $("alert").hidden = true; }, 6000);
  }
  const item = document.createElement("li");
  item.className = kind;
  item.textContent = text;
  $("notes").append(item);
  while ($("notes").children.length > 30) $("notes").firstChild.remove();
}

function showSeat() {
  const people = seat.people > 1 ? `${seat.people} people here` : "";
  $("seat-text").textContent = drives() ? ["you drive", people].filter(Boolean).join(" \u00b7 ") : `${seat.free ? "nobody drives" : "somebody else drives; you are watching"}${people ? ` \u00b7 ${people}` : ""}`;
  $("seat-button").hidden = !(drives() ? seat.people > 1 : seat.free);
  $("seat-button").textContent = drives() ? "Hand over" : "Take the wheel";
  for (const control of document.querySelectorAll("[data-drives], .pads button, .stage-column .actions button:not(#help-button)")) control.disabled = !drives();
  if (state) show(state);
}

setInterval(() => {
  const now = performance.now();
  while (drawn.length && drawn[0] < now - 2000) drawn.shift();
  $("rate").textContent = drawn.length > 1 ? `${(drawn.length / 2).toFixed(0)} pictures a second` : "";
}, 1000);

connect();
