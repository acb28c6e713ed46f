// Deltas become text, SRT and WebVTT, by the rules of client/subtitles.py and client/output.py.

const MAX_LINE_CHARACTERS = 42;
const MIN_CUE_MS = 1000;
const MAX_CUE_MS = 6000;
const MAX_PAUSE_MS = 1500;

/** Collects the words of one text into cues; a cue is {startMs, endMs, lines}. */
class CueMaker {
  words = [];
  isComplete = false; // no further word joins these
  screenFreeMs = 0;
  cues = [];

  push(words, isEndpoint) {
    for (const word of words) {
      if (this.words.length && (this.isComplete || !this.fits(word))) this.close(word.startMs);
      this.words.push(word);
    }
    if (isEndpoint) this.end();
  }

  /** No further word joins the open cue. */
  end() {
    this.isComplete = this.words.length > 0;
    // A long enough cue does not depend on when the next one begins.
    if (this.isComplete && this.words.at(-1).endMs - this.startMs >= MIN_CUE_MS) this.close();
  }

  /** All cues, the open one as if nothing followed it. */
  all() {
    return this.words.length ? [...this.cues, this.cue()] : this.cues;
  }

  get startMs() {
    return Math.max(this.words[0].startMs, this.screenFreeMs);
  }

  fits(word) {
    return (
      word.startMs - this.words.at(-1).endMs <= MAX_PAUSE_MS &&
      word.endMs - this.startMs <= MAX_CUE_MS &&
      Math.max(...wrapped([...this.words, word]).map(length)) <= MAX_LINE_CHARACTERS
    );
  }

  cue(nextStartMs = Infinity) {
    const startMs = this.startMs;
    const endMs = Math.min(Math.max(this.words.at(-1).endMs, startMs + MIN_CUE_MS), nextStartMs);
    return { startMs, endMs: Math.max(endMs, startMs + 1), lines: wrapped(this.words) };
  }

  close(nextStartMs) {
    const cue = this.cue(nextStartMs);
    this.cues.push(cue);
    this.screenFreeMs = cue.endMs;
    this.words = [];
    this.isComplete = false;
  }
}

function length(text) {
  return [...text].length;
}

/** The words in one line if they fit, else in the two lines of most equal length. */
function wrapped(words) {
  const parts = words.map((word) => word.text.trim().split(/\s+/).join(" "));
  const text = parts.join(" ");
  if (length(text) <= MAX_LINE_CHARACTERS || parts.length === 1) return [text];
  const splits = parts.slice(1).map((_, i) => [parts.slice(0, i + 1).join(" "), parts.slice(i + 1).join(" ")]);
  const widths = splits.map((lines) => Math.max(...lines.map(length)));
  return splits[widths.indexOf(Math.min(...widths))];
}

/** The words of a translation, timed as if they were spoken evenly, letter by letter, while their source was. */
function spread(delta) {
  const texts = delta.delta.split(/\s+/).filter(Boolean);
  const spanMs = delta.source_end_ms - delta.source_start_ms;
  const letters = texts.reduce((sum, text) => sum + length(text), 0) || 1;
  let said = 0;
  return texts.map((text) => {
    const startMs = delta.source_start_ms + Math.floor((spanMs * said) / letters);
    said += length(text);
    return { text, startMs, endMs: delta.source_start_ms + Math.floor((spanMs * said) / letters) };
  });
}

/** One text, what was said or one translation, as it grows. */
export class Transcript {
  constructor() {
    this.deltas = [];
    this.isEmpty = true;
    this.maker = new CueMaker();
    this.offsetMs = 0;
  }

  /** Add one delta of the service. */
  push(delta) {
    this.deltas.push(delta.delta);
    this.isEmpty &&= delta.delta.trim() === "";
    const words = delta.words?.map((word) => ({ text: word.word, startMs: word.start_ms, endMs: word.end_ms }));
    const moved = (words ?? spread(delta)).map((word) => ({
      text: word.text,
      startMs: word.startMs + this.offsetMs,
      endMs: word.endMs + this.offsetMs,
    }));
    this.maker.push(moved, delta.endpoint);
  }

  /** Go on with another session, whose audio begins `offsetMs` after that of the first. */
  goOn(offsetMs) {
    this.offsetMs = offsetMs;
    this.maker.end();
  }

  /** The text in the form of a file: `txt`, `srt` or `vtt`. */
  written(form) {
    return { txt: () => this.txt(), srt: () => this.srt(), vtt: () => this.vtt() }[form]();
  }

  txt() {
    return `${this.deltas.join("").trimStart()}\n`;
  }

  srt() {
    const cues = this.maker.all().map(({ startMs, endMs, lines }, i) => {
      const text = lines.join("\n").replaceAll("-->", "->"); // SubRip has no escapes
      return `${i + 1}\n${clock(startMs, ",")} --> ${clock(endMs, ",")}\n${text}\n\n`;
    });
    return cues.join("");
  }

  vtt() {
    const cues = this.maker.all().map(({ startMs, endMs, lines }) => {
      const text = lines.join("\n").replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
      return `${clock(startMs, ".")} --> ${clock(endMs, ".")}\n${text}\n\n`;
    });
    return `WEBVTT\n\n${cues.join("")}`;
  }
}

/** Milliseconds as hours, minutes, seconds and thousandths. */
function clock(ms, separator) {
  const [hours, minutes, seconds] = [ms / 3600000, (ms / 60000) % 60, (ms / 1000) % 60].map((value) =>
    String(Math.floor(value)).padStart(2, "0"),
  );
  return `${hours}:${minutes}:${seconds}${separator}${String(ms % 1000).padStart(3, "0")}`;
}
