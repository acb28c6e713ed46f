// Runs on the browser's audio thread: samples at the native rate -> blocks of s16le with their peak.

const BLOCKS_PER_SECOND = 25; // 40 ms: little to wait for, and few messages
const SILENCE = new Float32Array(128); // while a source gives nothing, its clock goes on

class Capture extends AudioWorkletProcessor {
  constructor() {
    super();
    this.block = new DataView(new ArrayBuffer(2 * Math.round(sampleRate / BLOCKS_PER_SECOND)));
    this.filledBytes = 0;
    this.peak = 0;
    this.isOver = false;
    this.port.onmessage = () => this.finish();
  }

  process([input]) {
    if (this.isOver) return false;
    for (const sample of input[0] ?? SILENCE) this.push(sample);
    return true;
  }

  push(sample) {
    const value = Math.max(-32768, Math.min(32767, Math.round(sample * 32768)));
    this.block.setInt16(this.filledBytes, value, true);
    this.filledBytes += 2;
    this.peak = Math.max(this.peak, Math.abs(sample));
    if (this.filledBytes === this.block.byteLength) this.tell(false);
  }

  /** Hand over what there is; of the last block, as much as was filled. */
  tell(isLast) {
    const pcm = this.block.buffer.slice(0, this.filledBytes);
    this.port.postMessage({ pcm, peak: this.peak, isLast }, [pcm]);
    this.filledBytes = 0;
    this.peak = 0;
  }

  finish() {
    this.isOver = true;
    this.tell(true);
  }
}

registerProcessor("capture", Capture);
