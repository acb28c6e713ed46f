// One session with the service, over a WebSocket, and over another one where the first is lost.

const URL_OF_SERVICE = new URL("v1/realtime/translations", document.baseURI);
const SUBPROTOCOL = "dragoman.v1";
const KEPT_BYTES = 16 << 20; // sent last, and kept for a service that might not have got it
const MIN_BACKOFF_MS = 100; // between attempts to connect again, growing
const MAX_BACKOFF_MS = 5000;
// What may pass. Whoever was let in before is of no foreign origin: the network came back before the reason was asked.
const PASSING = ["unreachable", "origin", "full"];

/**
 * Why there is no session; `code` is the service's, or `unauthorized`, `full`, `origin`, `refused`, `unreachable` or
 * `connection_lost`.
 */
export class ServiceError extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

/** Open a session; resolves when the service has told its defaults. */
export async function connect(token) {
  const { socket, event } = await dial(URL_OF_SERVICE, token);
  return new Session(socket, event.session, token);
}

/**
 * Connect, say what there is to say, and wait for the first event.
 *
 * A browser cannot send a header with a WebSocket, so the token goes as a subprotocol.
 */
function dial(address, token, greeting = null) {
  const url = new URL(address);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  const socket = new WebSocket(url, token ? [SUBPROTOCOL, tokenSubprotocol(token)] : [SUBPROTOCOL]);
  socket.binaryType = "arraybuffer";
  return new Promise((resolve, reject) => {
    socket.onopen = () => greeting && socket.send(JSON.stringify(greeting));
    socket.onmessage = ({ data }) => {
      const event = JSON.parse(data);
      if (event.type === "error") reject(new ServiceError(event.error.code, sentence(event.error.message)));
      else resolve({ socket, event });
    };
    socket.onclose = async ({ code }) => {
      reject(code === 1013 ? new ServiceError("full", FULL) : await whyRefused(address, token));
    };
  });
}

const FULL = "All sessions of the service are in use. Try again in a while.";

/** A browser does not tell a page why a WebSocket was refused; the same request without one does. */
async function whyRefused(address, token) {
  const isSendable = token && /^[\x21-\x7e]+$/.test(token);
  let answer;
  try {
    const headers = isSendable ? { Authorization: `Bearer ${token}` } : {};
    answer = await fetch(address, { headers, cache: "no-store" });
  } catch {
    return new ServiceError("unreachable", "The service does not answer. Check that it runs, then try again.");
  }
  switch (answer.status) {
    case 401:
      return new ServiceError("unauthorized", token ? "This token is wrong." : "This service asks for a token.");
    case 503:
      return new ServiceError("full", FULL);
    case 426: // it would have been let in, had it not been a page
      return new ServiceError(
        "origin",
        `The service does not let this page in. Start it with --allow-origin ${location.origin}.`,
      );
    default:
      return new ServiceError("refused", `The service refused: ${(await answer.text()).trim()}`);
  }
}

function tokenSubprotocol(token) {
  const bytes = String.fromCharCode(...new TextEncoder().encode(token));
  return `dragoman.token.${btoa(bytes).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "")}`;
}

/** An open session. */
export class Session {
  constructor(socket, offer, token) {
    /** What `session.created` told: settings, models, languages, latencies. */
    this.offer = offer;
    this.token = token;
    /** Takes each event of the service. */
    this.onEvent = () => {};
    /** Told when the connection is lost, with false, and when the session goes on, with true. */
    this.onLink = () => {};
    this.bytesPerMs = 0;
    this.problem = null;
    this.seq = 0; // of the last event, which was `session.created`
    this.kept = []; // messages that the service might not have got
    this.keptFrom = 0; // number of the first of them
    this.keptBytes = 0;
    this.unsentBytes = 0; // of those that came while there was no connection
    this.isOver = false;
    /** Resolves when all is told; rejects with a `ServiceError` if the session ends before that. */
    this.ended = new Promise((resolve, reject) => {
      this.resolve = resolve;
      this.reject = reject;
    });
    this.ended.catch(() => {}); // it may end while nobody waits
    this.attach(socket);
  }

  attach(socket) {
    this.socket = socket;
    socket.onmessage = ({ data }) => this.take(JSON.parse(data));
    socket.onclose = ({ code }) => {
      const isLost = code === 1006 && this.kept.length > 0 && this.offer.resume;
      if (isLost && !this.isOver) this.goOn();
      else this.fail(new ServiceError("connection_lost", LOST));
    };
  }

  take(event) {
    if (event.seq <= this.seq) return; // it came before the connection was lost
    this.seq = event.seq;
    const { code, message } = event.error ?? {};
    this.problem = code ? new ServiceError(code, sentence(message)) : null; // after an error the session may go on
    this.onEvent(event);
    if (event.type === "session.closed") {
      this.isOver = true;
      this.resolve();
    }
  }

  fail(error) {
    this.isOver = true;
    this.reject(this.problem ?? error);
  }

  /** Connect again, and send what has not arrived. */
  async goOn() {
    const { token, within_s } = this.offer.resume;
    const giveUpAt = performance.now() + 1000 * within_s;
    const address = new URL(URL_OF_SERVICE);
    address.searchParams.set("resume", this.offer.id);
    this.onLink(false);
    let backoffMs = MIN_BACKOFF_MS;
    for (;;) {
      await new Promise((resolve) => setTimeout(resolve, backoffMs * (0.5 + Math.random() / 2)));
      if (this.isOver) return;
      try {
        const { socket, event } = await dial(address, this.token, { type: "session.resume", token, seq: this.seq });
        if (event.messages < this.keptFrom) throw new ServiceError("resume_impossible", LOST);
        if (this.isOver) return socket.close();
        this.attach(socket);
        this.unsentBytes = 0;
        for (const message of this.kept.slice(event.messages - this.keptFrom)) socket.send(message);
        return this.onLink(true);
      } catch (error) {
        if (!PASSING.includes(error.code) || performance.now() + backoffMs > giveUpAt) {
          return this.fail(new ServiceError("connection_lost", LOST));
        }
      }
      backoffMs = Math.min(2 * backoffMs, MAX_BACKOFF_MS);
    }
  }

  /** Say what is to be done with audio of mono s16le at `rateHz`. */
  declare(rateHz, languages, latency) {
    this.bytesPerMs = (2 * rateHz) / 1000;
    const input = { format: { type: "audio/pcm", rate: rateHz } };
    this.tell({ type: "session.update", session: { audio: { input, output: { languages } }, latency } });
  }

  send(pcm) {
    if (pcm.byteLength) this.put(pcm);
  }

  /** Audio that waits here because the connection is slow or lost, or the service busy. */
  get waitingMs() {
    return this.bytesPerMs ? (this.socket.bufferedAmount + this.unsentBytes) / this.bytesPerMs : 0;
  }

  /** End the audio; the last words still come. */
  finish() {
    this.tell({ type: "session.close" });
  }

  /** Leave at once. */
  abandon() {
    const isDown = this.socket.readyState === WebSocket.CLOSED;
    this.socket.close();
    if (isDown && !this.isOver) this.fail(new ServiceError("connection_lost", LOST));
    this.isOver = true;
  }

  tell(event) {
    this.put(JSON.stringify(event));
  }

  /** Send a message, now or when the session goes on, and keep it for a while. */
  put(message) {
    if (this.isOver) return;
    this.kept.push(message);
    this.keptBytes += size(message);
    while (this.keptBytes > KEPT_BYTES) {
      this.keptBytes -= size(this.kept.shift());
      this.keptFrom += 1;
    }
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(message);
    else this.unsentBytes += size(message);
  }
}

function size(message) {
  return message.byteLength ?? message.length;
}

const LOST = "The connection to the service was lost. What was said until then is kept: start again to go on.";

function sentence(text) {
  return `${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;
}
