// Where audio comes from: a microphone, another tab, a file. All give blocks of mono s16le and their peak.

const FILE_RATE_HZ = 16000; // the rate that the service works at: a longer file fits in memory
const FILE_BLOCK_SAMPLES = FILE_RATE_HZ / 10;
const MAX_FILE_MINUTES = 90;

/** Something that the person can put right, in a sentence. */
export class AudioError extends Error {}

/** Ask for a microphone; `deviceId` is empty for the default one. */
export async function openMicrophone(deviceId) {
  requireDevices();
  const audio = {
    // Recognisers are trained on rooms as they are; what cleans calls up takes words with it.
    echoCancellation: false,
    noiseSuppression: false,
    autoGainControl: true,
    ...(deviceId ? { deviceId: { exact: deviceId } } : {}),
  };
  try {
    return await navigator.mediaDevices.getUserMedia({ audio });
  } catch (error) {
    throw new AudioError(MICROPHONE_PROBLEMS[error.name] ?? `The microphone cannot be used: ${error.message}`);
  }
}

const MICROPHONE_PROBLEMS = {
  NotAllowedError: "The microphone is blocked. Allow it for this page in the address bar, then start again.",
  NotFoundError: "There is no microphone. Connect one, then start again.",
  NotReadableError: "The microphone is in use by another program. Close that, then start again.",
  OverconstrainedError: "The chosen microphone is gone. Choose another one, then start again.",
};

/** Ask for the sound of a tab or of the screen. */
export async function openTab() {
  requireDevices();
  if (!navigator.mediaDevices.getDisplayMedia) {
    throw new AudioError("This browser cannot share the sound of a tab. Use a microphone or a file.");
  }
  // A browser shares sound only together with a picture; this one is as small as can be, and goes nowhere.
  const video = { width: 16, height: 16, frameRate: 1 };
  const audio = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
  let stream;
  try {
    stream = await navigator.mediaDevices.getDisplayMedia({ video, audio });
  } catch (error) {
    const sentence = error.name === "NotAllowedError" ? "Nothing was shared." : `Nothing can be shared: ${error.message}`;
    throw new AudioError(`${sentence} Start again and choose a tab.`);
  }
  if (stream.getAudioTracks().length === 0) {
    stop(stream);
    throw new AudioError("What was shared has no sound. Start again, choose a tab and turn on “Also share tab audio”.");
  }
  return stream;
}

function requireDevices() {
  if (!navigator.mediaDevices) {
    throw new AudioError(
      "Browsers lend the microphone only to pages from https or from localhost. Open this page there, or use a file.",
    );
  }
}

/** The microphones, as {id, label}; labels are empty until one was allowed. */
export async function microphones() {
  const devices = (await navigator.mediaDevices?.enumerateDevices()) ?? [];
  return devices
    .filter((device) => device.kind === "audioinput" && device.deviceId !== "")
    .map((device) => ({ id: device.deviceId, label: device.label }));
}

function stop(stream) {
  for (const track of stream.getTracks()) track.stop();
}

/** A live source, recorded at the rate of the machine. */
export class LiveSource {
  constructor(stream) {
    this.stream = stream;
    this.context = new AudioContext();
    this.rateHz = this.context.sampleRate;
    this.durationMs = null;
    this.node = null;
    this.isOver = false;
  }

  /**
   * Record until `finish`, or until the source ends by itself.
   *
   * `onBlock(pcm, peak)` takes what was heard; the promise settles after the last block.
   */
  async run(onBlock) {
    try {
      await this.context.audioWorklet.addModule(new URL("capture.js", import.meta.url));
      await this.context.resume();
    } catch (error) {
      throw new AudioError(`This browser cannot record: ${error.message}`);
    }
    if (this.isOver) return;
    await this.record(onBlock);
    this.close();
  }

  record(onBlock) {
    const sound = new MediaStream(this.stream.getAudioTracks());
    this.node = new AudioWorkletNode(this.context, "capture", {
      channelCount: 1,
      channelCountMode: "explicit",
      channelInterpretation: "speakers",
    });
    const source = this.context.createMediaStreamSource(sound);
    source.connect(this.node).connect(this.context.destination); // silent: it writes nothing
    for (const track of sound.getAudioTracks()) track.onended = () => this.finish();
    return new Promise((resolve) => {
      this.node.port.onmessage = ({ data }) => {
        onBlock(data.pcm, data.peak);
        if (data.isLast) resolve();
      };
    });
  }

  finish() {
    this.isOver = true;
    this.node?.port.postMessage("finish");
  }

  /** Let the device go. */
  close() {
    stop(this.stream);
    return this.context.state === "closed" ? null : this.context.close();
  }
}

/** A recording, sent as fast as it is taken or at the pace of speech. */
export class FileSource {
  /** Decode `file`; `isPaced` gives it at the pace of speech. */
  static async open(file, isPaced) {
    if ((await minutesOf(file)) > MAX_FILE_MINUTES) {
      throw new AudioError(`${file.name} is longer than ${MAX_FILE_MINUTES} minutes. Use “dragoman transcribe” for it.`);
    }
    const context = new OfflineAudioContext(1, 1, FILE_RATE_HZ);
    try {
      return new FileSource(mixed(await context.decodeAudioData(await file.arrayBuffer())), isPaced);
    } catch (error) {
      throw new AudioError(`${file.name} cannot be read as audio: this browser does not know its format, or it is damaged.`);
    }
  }

  constructor(samples, isPaced) {
    this.samples = samples;
    this.isPaced = isPaced;
    this.rateHz = FILE_RATE_HZ;
    this.durationMs = (1000 * samples.length) / FILE_RATE_HZ;
    this.isOver = false;
  }

  /** As `LiveSource.run`; `untilRoom()` resolves when more may be sent. */
  async run(onBlock, untilRoom) {
    const startedMs = performance.now();
    for (let start = 0; start < this.samples.length && !this.isOver; start += FILE_BLOCK_SAMPLES) {
      const block = this.samples.subarray(start, start + FILE_BLOCK_SAMPLES);
      if (this.isPaced) await sleep(startedMs + (1000 * (start + block.length)) / FILE_RATE_HZ - performance.now());
      await untilRoom();
      onBlock(toPcm(block), block.reduce((peak, sample) => Math.max(peak, Math.abs(sample)), 0));
    }
  }

  finish() {
    this.isOver = true;
  }

  close() {
    this.samples = new Float32Array();
  }
}

export function sleep(ms) {
  return ms > 0 ? new Promise((resolve) => setTimeout(resolve, ms)) : Promise.resolve();
}

/** How long a recording says it is; 0 if it does not say. */
async function minutesOf(file) {
  const player = new Audio();
  player.preload = "metadata";
  player.src = URL.createObjectURL(file);
  await new Promise((resolve) => (player.onloadedmetadata = player.onerror = resolve));
  URL.revokeObjectURL(player.src);
  return Number.isFinite(player.duration) ? player.duration / 60 : 0;
}

/** The mean of all channels. */
function mixed(audio) {
  const samples = audio.getChannelData(0);
  for (let i = 1; i < audio.numberOfChannels; i++) {
    audio.getChannelData(i).forEach((sample, at) => (samples[at] += sample));
  }
  return audio.numberOfChannels === 1 ? samples : samples.map((sample) => sample / audio.numberOfChannels);
}

function toPcm(samples) {
  const view = new DataView(new ArrayBuffer(2 * samples.length));
  samples.forEach((sample, i) => {
    view.setInt16(2 * i, Math.max(-32768, Math.min(32767, Math.round(sample * 32768))), true);
  });
  return view.buffer;
}
