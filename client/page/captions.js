// What is seen: a pane for what was said, and one for each translation. Text is only ever added.

import { Transcript } from "./subtitles.js";

const SHOWN_PARAGRAPHS = 60; // older ones leave the page; the files that are saved have everything
const LONG_PARAGRAPH_CHARACTERS = 400; // a speaker who does not pause
const FORMS = [
  ["srt", "SubRip subtitles"],
  ["vtt", "WebVTT subtitles"],
  ["txt", "text"],
];

/** One text: its heading, its captions, its files. */
export class Pane {
  /**
   * `language` is its code, or "" for what was said; `onSave(pane, form)` is called when a file is asked for.
   */
  constructor(language, title, onSave) {
    this.language = language;
    this.transcript = new Transcript();
    this.element = document.getElementById("pane").content.firstElementChild.cloneNode(true);
    this.element.dataset.language = language;
    this.log = this.element.querySelector(".log");
    this.latest = this.element.querySelector(".latest");
    this.announce = this.element.querySelector(".announce");
    this.name(title);
    this.saves = FORMS.map(([form, kind]) => this.saveButton(form, `Save ${title} as ${kind}`, onSave));
    this.element.querySelector(".saves").append(...this.saves);
    this.latest.addEventListener("click", () => this.follow());
    this.isFollowing = true; // until the person scrolls back
    this.log.addEventListener("scroll", () => this.scrolled());
    new ResizeObserver(() => this.isFollowing && this.follow()).observe(this.log);
    this.announce.addEventListener("click", () => this.setAnnounced(this.log.ariaLive === "off"));
    this.setAnnounced(false);
  }

  name(title) {
    const heading = this.element.querySelector("h2");
    heading.textContent = title;
    heading.id = `heading-${this.language || "speech"}`;
    this.element.setAttribute("aria-labelledby", heading.id);
    this.log.setAttribute("aria-labelledby", heading.id);
    this.announce.ariaLabel = `Announce ${title} to a screen reader`;
    if (this.language) this.log.lang = this.language;
  }

  saveButton(form, label, onSave) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = form.toUpperCase();
    button.title = button.ariaLabel = label;
    button.disabled = true;
    button.addEventListener("click", () => onSave(this, form));
    return button;
  }

  /** Whether a screen reader speaks what is added; two texts at a time would be noise. */
  setAnnounced(isAnnounced) {
    this.log.ariaLive = isAnnounced ? "polite" : "off";
    this.announce.ariaPressed = String(isAnnounced);
  }

  /** Add one delta of the service. */
  push(delta) {
    this.transcript.push(delta);
    if (delta.delta.trim()) this.show(delta.delta);
    if (delta.endpoint) this.paragraph = null;
    for (const button of this.saves) button.disabled = this.transcript.isEmpty;
  }

  show(text) {
    if (!this.paragraph || this.paragraph.textContent.length > LONG_PARAGRAPH_CHARACTERS) this.beginParagraph();
    const piece = document.createElement("span"); // a node of its own, so that a screen reader speaks it alone
    piece.textContent = this.paragraph.hasChildNodes() ? text : text.trimStart();
    this.paragraph.append(piece);
    if (this.isFollowing) this.follow();
  }

  beginParagraph() {
    this.paragraph = document.createElement("p");
    this.paragraph.dir = "auto";
    this.log.append(this.paragraph);
    while (this.log.childElementCount > SHOWN_PARAGRAPHS) this.log.firstElementChild.remove();
  }

  /** Let another session add to the text; its audio begins at `offsetMs`. */
  goOn(offsetMs) {
    this.transcript.goOn(offsetMs);
    this.paragraph = null;
  }

  scrolled() {
    this.isFollowing = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 40;
    this.latest.hidden = this.isFollowing;
  }

  /** Show the newest words, and those that come. */
  follow() {
    this.log.scrollTop = this.log.scrollHeight;
    this.isFollowing = this.latest.hidden = true;
  }
}

/** Give the person a file. */
export function save(name, text, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
