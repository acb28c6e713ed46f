// One session with the service, over a WebSocket.

const URL_OF_SERVICE = new URL("v1/realtime/translations", document.baseURI);
const SUBPROTOCOL = "dragoman.v1";

/** Why there is no session; `code` is the service's, or `unauthorized`, `full`, `refused`, `unreachable` or `connection_lost`. */
export class ServiceError extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

/**
 * Open a session; resolves when the service has told its defaults.
 *
 * A browser cannot send a header with a WebSocket, so the token goes as a subprotocol.
 */
export function connect(token) {
  const url = new URL(URL_OF_SERVICE);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  const socket = new WebSocket(url, token ? [SUBPROTOCOL, tokenSubprotocol(token)] : [SUBPROTOCOL]);
  socket.binaryType = "arraybuffer";
  return new Promise((resolve, reject) => {
    socket.onmessage = ({ data }) => {
      const event = JSON.parse(data);
      if (event.type === "error") reject(new ServiceError(event.error.code, sentence(event.error.message)));
      else resolve(new Session(socket, event.session));
    };
    socket.onclose = async ({ code }) => {
      reject(code === 1013 ? new ServiceError("full", FULL) : await whyRefused(token));
    };
  });
}

const FULL = "All sessions of the service are in use. Try again in a while.";

/** A browser does not tell a page why a WebSocket was refused; the same request without one does. */
async function whyRefused(token) {
  const isSendable = token && /^[\x21-\x7e]+$/.test(token);
  let answer;
  try {
    const headers = isSendable ? { Authorization: `Bearer ${token}` } : {};
    answer = await fetch(URL_OF_SERVICE, { headers, cache: "no-store" });
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
        "refused",
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
  constructor(socket, offer) {
    this.socket = socket;
    /** What `session.created` told: settings, models, languages, latencies. */
    this.offer = offer;
    /** Takes each event of the service. */
    this.onEvent = () => {};
    this.bytesPerMs = 0;
    this.problem = null;
    /** Resolves when all is told; rejects with a `ServiceError` if the session ends before that. */
    this.ended = new Promise((resolve, reject) => {
      socket.onmessage = ({ data }) => this.take(JSON.parse(data), resolve);
      socket.onclose = () => reject(this.problem ?? new ServiceError("connection_lost", LOST));
    });
    this.ended.catch(() => {}); // it may end while nobody waits
  }

  take(event, resolve) {
    if (event.type === "error") this.problem = new ServiceError(event.error.code, sentence(event.error.message));
    this.onEvent(event);
    if (event.type === "session.closed") resolve();
  }

  /** Say what is to be done with audio of mono s16le at `rateHz`. */
  declare(rateHz, languages, latency) {
    this.bytesPerMs = (2 * rateHz) / 1000;
    const input = { format: { type: "audio/pcm", rate: rateHz } };
    this.tell({ type: "session.update", session: { audio: { input, output: { languages } }, latency } });
  }

  send(pcm) {
    if (pcm.byteLength && this.socket.readyState === WebSocket.OPEN) this.socket.send(pcm);
  }

  /** Audio that waits here because the connection is slow or the service busy. */
  get waitingMs() {
    return this.bytesPerMs ? this.socket.bufferedAmount / this.bytesPerMs : 0;
  }

  /** End the audio; the last words still come. */
  finish() {
    this.tell({ type: "session.close" });
  }

  /** Leave at once. */
  abandon() {
    this.socket.close();
  }

  tell(event) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(event));
  }
}

const LOST = "The connection to the service was lost. What was said until then is kept: start again to go on.";

function sentence(text) {
  return `${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;
}
