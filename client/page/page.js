// The page: what the person chooses, what is going on, and one session at a time.

import { AudioError, FileSource, LiveSource, microphones, openMicrophone, openTab, sleep } from "./audio.js";
import { Pane, save } from "./captions.js";
import { ServiceError, connect } from "./session.js";

const MAX_WAITING_MS = 30000; // audio that a slow connection may leave here before the session is given up
const FILE_WAITING_MS = 2000; // how far a recording is sent ahead
const STAGE_SIZES = [4, 5, 6, 7.5, 9, 11]; // of letters, in hundredths of the width of the window
const TYPES = { txt: "text/plain", srt: "application/x-subrip", vtt: "text/vtt" };

const $ = (id) => document.getElementById(id);
const languageNames = new Intl.DisplayNames(["en"], { type: "language" });

let offer = null; // what the service can do, once it has told
let running = null; // {session, source, isFinishing} while a session runs
let panes = new Map(); // language -> Pane; "" is what was said
let heardMs = 0; // audio of the sessions before this one, and of this one up to its newest event
let offsetMs = 0; // of the sessions before this one
let startedAt = null; // when the first of them began
let recordingName = ""; // of the file, if it is one
let stageSize = 2;
let wakeLock = null;

// --- the service -----------------------------------------------------------------------------------------------

/** Ask the service what it can do, and fill the choices from its answer. */
async function ask() {
  setState("connecting", "Connecting");
  setProblem("");
  try {
    const session = await connect($("token").value);
    session.abandon();
    offer = session.offer;
  } catch (error) {
    offer = null;
    showProblem(error);
  }
  showOffer();
}

function showOffer() {
  if (offer) setState("ready", "Ready");
  showRunning();
  if (!offer) return;
  $("token-fields").hidden = true;
  const translator = offer.translator;
  $("translations").hidden = !translator;
  $("models").textContent = translator
    ? `Recogniser ${offer.model}, translator ${translator.model}`
    : `Recogniser ${offer.model}; this service does not translate`;
  if (!translator) return;
  fillLanguages(translator.languages);
  const known = new Set([...$("latency").options].map((option) => option.value));
  if (translator.latencies.some((latency) => !known.has(latency))) {
    $("latency").replaceChildren(...translator.latencies.map((latency) => new Option(latencyName(latency), latency)));
    $("latency").value = offer.latency;
  }
}

function fillLanguages(languages) {
  const chosen = new Set(chosenLanguages());
  $("languages").replaceChildren(
    ...languages.map((language) => {
      const label = document.createElement("label");
      const box = Object.assign(document.createElement("input"), { type: "checkbox", value: language });
      box.checked = chosen.has(language);
      label.append(box, ` ${languageNames.of(language)}`);
      return label;
    }),
  );
}

function latencyName(latency) {
  const name = `${latency.charAt(0).toUpperCase()}${latency.slice(1).replace("-", " to ")}`;
  return latency === "offline" ? "Offline: waits for a pause" : name;
}

function chosenLanguages() {
  return [...$("languages").querySelectorAll("input:checked")].map((box) => box.value);
}

// --- a session -------------------------------------------------------------------------------------------------

/** Open the source and a session, run it to its end, and tell how it ended. */
async function run() {
  setProblem("");
  setState("connecting", "Connecting");
  const own = { session: null, source: null, isFinishing: false };
  running = own;
  showRunning();
  try {
    own.source = await openSource();
    own.session = await connect($("token").value);
    if (own.isFinishing) throw new ServiceError("stopped", "");
    await talk(own);
  } catch (error) {
    showProblem(error);
  } finally {
    own.source?.close();
    own.session?.abandon();
    running = null;
    offsetMs = heardMs;
    showRunning();
  }
}

async function talk(own) {
  const { session, source } = own;
  const languages = chosenLanguages();
  preparePanes(languages);
  session.onEvent = take;
  session.declare(Math.round(source.rateHz), languages, $("latency").value || "medium");
  const showLive = () => setState("live", source.durationMs === null ? "Live" : "Reading");
  session.onLink = (isUp) => {
    if (!isUp) setState("lost", "Connecting again");
    else if (own.isFinishing) setState("finishing", "Finishing");
    else showLive();
  };
  showLive();
  let sentMs = 0;
  const send = (pcm, peak) => {
    session.send(pcm);
    sentMs += pcm.byteLength / session.bytesPerMs;
    showLevel(peak);
    showProgress(sentMs, source.durationMs);
    if ($("state").dataset.state === "lost") showDelay(session.waitingMs);
    if (session.waitingMs > MAX_WAITING_MS) giveUp(session);
  };
  const untilRoom = async () => {
    while (session.waitingMs > FILE_WAITING_MS && !own.isFinishing) await sleep(20);
  };
  const sent = source.run(send, untilRoom).then(() => {
    if (running === own && !own.isFinishing) finish();
    session.finish();
  });
  await Promise.race([session.ended, sent.then(() => session.ended)]);
  setState("ready", "Ready");
}

function giveUp(session) {
  const seconds = Math.round(MAX_WAITING_MS / 1000);
  session.problem = new ServiceError("too_slow", `${seconds} s of audio wait to be sent: the connection is too slow.`);
  session.abandon();
}

async function openSource() {
  const kind = chosenSource();
  recordingName = "";
  if (kind === "file") {
    const file = $("file").files[0];
    if (!file) throw new AudioError("Choose a recording first.");
    recordingName = file.name.replace(/\.[^.]*$/, "");
    return FileSource.open(file, $("paced").checked);
  }
  const source = new LiveSource(await (kind === "tab" ? openTab() : openMicrophone($("device").value)));
  fillDevices();
  return source;
}

/** What the service tells. */
function take(event) {
  switch (event.type) {
    case "session.input_transcript.delta":
      panes.get("").push(event);
      heardMs = Math.max(heardMs, offsetMs + event.emitted_ms);
      showDelayOf(event);
      break;
    case "session.output_transcript.delta":
      panes.get(event.language).push(event);
      break;
    case "session.closed":
      heardMs = offsetMs + event.audio_ms;
      break;
    case "error":
      setProblem(running?.session?.problem.message ?? event.error.message);
  }
}

/** End the audio, and wait for the last words; a second time, do not wait. */
function finish() {
  if (!running) return;
  if (running.isFinishing) {
    running.session?.abandon();
    return;
  }
  running.isFinishing = true;
  setState("finishing", "Finishing");
  running.source?.finish();
  showRunning();
}

// --- what is seen ----------------------------------------------------------------------------------------------

/** A pane for what is said and for each language; those of sessions before stay, and go on. */
function preparePanes(languages) {
  startedAt ??= new Date();
  $("empty").hidden = true;
  for (const language of ["", ...languages]) {
    if (!panes.has(language)) {
      const pane = new Pane(language, language ? languageNames.of(language) : "Speech", savePane);
      panes.set(language, pane);
      $("panes").append(pane.element);
    }
  }
  for (const pane of panes.values()) pane.goOn(offsetMs);
  if (offsetMs === 0) panes.get(languages[0] ?? "").setAnnounced(true);
  fillStageChoices();
  showRunning();
}

function clearPanes() {
  panes = new Map();
  heardMs = offsetMs = 0;
  startedAt = null;
  $("panes").replaceChildren();
  $("empty").hidden = false;
  showRunning();
}

function savePane(pane, form) {
  const two = (number) => String(number).padStart(2, "0");
  const [date, clock] = [
    [startedAt.getFullYear(), two(startedAt.getMonth() + 1), two(startedAt.getDate())],
    [two(startedAt.getHours()), two(startedAt.getMinutes())],
  ];
  const name = recordingName || `captions-${date.join("-")}-${clock.join("")}`;
  save(`${name}${pane.language && "."}${pane.language}.${form}`, pane.transcript.written(form), TYPES[form]);
}

function showRunning() {
  const isFinishing = Boolean(running?.isFinishing);
  $("start").textContent = running ? (isFinishing ? "Do not wait" : "Stop") : offer ? "Start" : "Connect";
  document.body.classList.toggle("running", Boolean(running));
  for (const id of ["sources", "translations"]) $(id).disabled = Boolean(running);
  $("sources").hidden = $("level-row").hidden = !offer;
  $("clear").disabled = Boolean(running) || panes.size === 0;
  $("stage-on").disabled = panes.size === 0;
  if (!running) {
    showLevel(0);
    $("progress").textContent = "";
  }
}

function setState(state, text) {
  $("state").dataset.state = state;
  $("state").textContent = text;
}

function setProblem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

function showProblem(error) {
  const isKnown = error instanceof AudioError || error instanceof ServiceError;
  if (!isKnown) console.error(error);
  setProblem(isKnown ? error.message : `Something went wrong in the page: ${error.message}`);
  const isOffline = error instanceof ServiceError && error.code !== "stopped";
  setState(isOffline ? "problem" : "ready", isOffline ? "Not connected" : "Ready");
  if (error.code === "unauthorized") {
    offer = null;
    $("token-fields").hidden = false;
    $("token").select();
    $("token").focus();
  }
}

function showLevel(peak) {
  const decibels = peak > 0 ? Math.max(-60, 20 * Math.log10(peak)) : -60;
  $("level").value = decibels;
  $("level").textContent = peak > 0 ? `${Math.round(decibels)} dB` : "silence";
}

function showProgress(sentMs, durationMs) {
  const time = clock(sentMs);
  const text = durationMs === null ? time : `${time} of ${clock(durationMs)}`;
  if ($("progress").textContent !== text) $("progress").textContent = text;
}

function clock(ms) {
  const seconds = Math.floor(ms / 1000);
  const [h, m, s] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, seconds % 60];
  return h ? `${h}:${String(m).padStart(2, "0")}:${String(s).padStart(2, "0")}` : `${m}:${String(s).padStart(2, "0")}`;
}

/** How long after its last word a caption came: audio that had to be heard, time to work, time to be sent. */
function showDelayOf(event) {
  const isLive = running?.source?.durationMs === null || $("paced").checked;
  $("delay").hidden = !isLive;
  if (!isLive || event.words.length === 0) return;
  showDelay(event.emitted_ms - event.end_ms + (event.backlog_ms ?? 0) + running.session.waitingMs);
}

function showDelay(delayMs) {
  $("delay-value").textContent = `${(Math.max(0, delayMs) / 1000).toFixed(1)} s`;
  $("delay").classList.toggle("late", delayMs > 3000);
}

// --- choices ---------------------------------------------------------------------------------------------------

function chosenSource() {
  return document.querySelector("input[name=source]:checked").value;
}

function showSource() {
  for (const option of document.querySelectorAll("[data-source]")) {
    option.hidden = option.dataset.source !== chosenSource();
  }
}

async function fillDevices() {
  const chosen = $("device").value;
  const found = (await microphones()).filter(({ id }) => id !== "default");
  const options = found.map(({ id, label }, i) => new Option(label || `Microphone ${i + 1}`, id));
  $("device").replaceChildren(new Option("Default microphone", ""), ...options);
  if (found.some(({ id }) => id === chosen)) $("device").value = chosen;
}

// --- the stage -------------------------------------------------------------------------------------------------

function fillStageChoices() {
  const chosen = $("stage-shown").value;
  const options = [...panes].map(([language, pane]) => new Option(pane.element.querySelector("h2").textContent, language));
  $("stage-shown").replaceChildren(new Option("Everything", "*"), ...options);
  $("stage-shown").value = panes.has(chosen) && chosen !== "" ? chosen : "*";
  showStageChoice();
}

function showStageChoice() {
  const shown = $("stage-shown").value;
  for (const [language, pane] of panes) pane.element.classList.toggle("off-stage", shown !== "*" && shown !== language);
}

/** Nothing but captions, as large as a hall needs them. */
async function enterStage() {
  document.body.classList.add("stage");
  $("stage-bar").hidden = false;
  setStageSize(stageSize);
  $("stage-off").focus();
  for (const pane of panes.values()) pane.follow();
  document.documentElement.requestFullscreen?.().catch(() => {}); // the view works in a window too
  await stayAwake();
}

async function stayAwake() {
  if (document.visibilityState !== "visible" || !document.body.classList.contains("stage")) return;
  wakeLock = (await navigator.wakeLock?.request("screen").catch(() => null)) ?? null;
}

async function leaveStage() {
  if (!document.body.classList.contains("stage")) return;
  document.body.classList.remove("stage");
  $("stage-bar").hidden = true;
  if (document.fullscreenElement) await document.exitFullscreen();
  await wakeLock?.release();
  wakeLock = null;
  $("stage-on").focus();
}

function setStageSize(size) {
  stageSize = Math.max(0, Math.min(STAGE_SIZES.length - 1, size));
  document.body.style.setProperty("--stage-size", `${STAGE_SIZES[stageSize]}vw`);
}

// --- beginning -------------------------------------------------------------------------------------------------

$("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) finish();
  else if (offer) run();
  else ask();
});
$("sources").addEventListener("change", showSource);
$("clear").addEventListener("click", clearPanes);
$("stage-on").addEventListener("click", enterStage);
$("stage-off").addEventListener("click", leaveStage);
$("smaller").addEventListener("click", () => setStageSize(stageSize - 1));
$("larger").addEventListener("click", () => setStageSize(stageSize + 1));
$("stage-shown").addEventListener("change", showStageChoice);
document.addEventListener("keydown", (event) => event.key === "Escape" && leaveStage());
document.addEventListener("visibilitychange", stayAwake); // which the browser ends when the page is hidden
document.addEventListener("fullscreenchange", () => document.fullscreenElement || leaveStage());
window.addEventListener("beforeunload", (event) => running && event.preventDefault());
navigator.mediaDevices?.addEventListener("devicechange", fillDevices);
showSource();
fillDevices();
ask();
