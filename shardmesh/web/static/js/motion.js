// Micro-batches on their way, slowed down so that an eye can follow.  One dot is one session's
// micro-batch; it dwells and moves in proportion to what its stages report.

const LAP_MS = 2200; // shown length of one trip through a chain, whatever it really takes
const LAP_STAGE_MS = 160; // and a little for each stage
const EVEN_SHARE = 0.25; // of a lap, divided evenly: a wire of 0.05 ms would not be seen
const DOTS_MAX = 64;
const PREFILL_DOTS = 3;
const RADIUS = 4;

export class Motion {
  constructor(canvas, gateway, cards) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.gateway = gateway;
    this.cards = cards;
    this.lanes = new Map();
    this.isStale = true;
    this.frame = 0;
    this.still = matchMedia("(prefers-reduced-motion: reduce)");
    const again = () => { this.isStale = true; this.wake(); };
    // The canvas is as wide as what is seen of the chain and goes along when that is scrolled.
    this.frameElement = canvas.parentElement.parentElement;
    const resized = new ResizeObserver(again);
    resized.observe(canvas.parentElement);
    resized.observe(this.frameElement);
    this.frameElement.addEventListener("scroll", again, { passive: true });
    addEventListener("themechange", again);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
    this.still.addEventListener("change", again);
    this.isInSight = true;
    new IntersectionObserver(([entry]) => { this.isInSight = entry.isIntersecting; this.wake(); }).observe(canvas);
  }

  /** The sessions that run now, as [id, session] pairs. */
  show(sessions, { isNewLayout }) {
    const now = performance.now();
    const running = new Set();
    for (const [id, session] of sessions.slice(0, DOTS_MAX)) {
      running.add(id);
      const lane = this.lanes.get(id) ?? { startedMs: now, endsMs: Infinity };
      const key = session.chain.join();
      if (lane.key !== key) Object.assign(lane, { key, chain: session.chain, segments: null });
      lane.session = session;
      lane.endsMs = Infinity;
      this.lanes.set(id, lane);
    }
    for (const [id, lane] of this.lanes) {
      if (running.has(id) || lane.endsMs !== Infinity) continue;
      // Let the dot finish the trip that it is on.
      const lap = this.lapMs(lane);
      lane.endsMs = lane.startedMs + Math.ceil((now - lane.startedMs) / lap) * lap;
    }
    if (isNewLayout) this.isStale = true;
    if (this.lanes.size || this.isStale) this.wake();
  }

  wake() {
    if (!this.frame && this.isInSight) this.frame = requestAnimationFrame((now) => this.draw(now));
  }

  lapMs(lane) {
    return LAP_MS + LAP_STAGE_MS * lane.chain.length;
  }

  draw(now) {
    this.frame = 0;
    if (this.isStale) this.measure();
    const { context } = this;
    context.clearRect(this.left, 0, this.width, this.height);
    for (const [id, lane] of this.lanes) {
      if (now >= lane.endsMs || !lane.chain.every((peer) => this.cards.has(peer))) this.lanes.delete(id);
      else lane.segments ??= this.segmentsOf(lane.chain);
    }
    const drawn = new Set();
    for (const lane of this.lanes.values()) {
      if (drawn.has(lane.key)) continue;
      drawn.add(lane.key);
      this.drawRail(lane.segments);
    }
    if (this.still.matches) return;
    for (const lane of this.lanes.values()) this.drawDots(lane, now);
    if (this.lanes.size && this.isInSight) this.frame = requestAnimationFrame((next) => this.draw(next));
  }

  measure() {
    this.isStale = false;
    const { clientWidth, scrollLeft } = this.frameElement;
    const { clientHeight } = this.canvas.parentElement;
    const left = Math.min(scrollLeft, Math.max(0, this.canvas.parentElement.clientWidth - clientWidth));
    this.canvas.style.left = `${left}px`;
    this.canvas.style.width = `${clientWidth}px`;
    const scale = Math.min(2, devicePixelRatio || 1);
    this.width = clientWidth;
    this.height = clientHeight;
    this.canvas.width = Math.round(clientWidth * scale);
    this.canvas.height = Math.round(clientHeight * scale);
    this.left = left;
    this.context.setTransform(scale, 0, 0, scale, -left * scale, 0);
    this.isVertical = getComputedStyle(this.canvas.parentElement).gridAutoFlow.startsWith("row");
    const colourOf = (name) => getComputedStyle(document.querySelector(`#legend i.${name}`)).backgroundColor;
    this.colours = { wire: colourOf("way"), queue: colourOf("wait"), compute: colourOf("go") };
    for (const lane of this.lanes.values()) lane.segments = null;
  }

  /** Where a micro-batch goes in and comes out of a card. */
  port(card) {
    const { offsetLeft: x, offsetTop: y, offsetWidth: w, offsetHeight: height } = card;
    const inset = Math.min(10, height / 2);
    return this.isVertical
      ? { from: [x, y + inset], to: [x, y + height - inset], side: x }
      : { from: [x + inset, y], to: [x + w - inset, y], side: y };
  }

  segmentsOf(chain) {
    const ports = [this.gateway, ...chain.map((peer) => this.cards.get(peer))].map((card) => this.port(card));
    const segments = [];
    for (let i = 1; i < ports.length; i += 1) {
      segments.push({ kind: "wire", path: this.wire(ports[i - 1].to, ports[i].from) });
      segments.push({ kind: "queue", path: [ports[i].from, ports[i].from] });
      segments.push({ kind: "compute", path: [ports[i].from, ports[i].to] });
    }
    segments.push({ kind: "wire", path: this.wayBack(ports.at(-1).to, ports[0]) });
    return segments;
  }

  wire(from, to) {
    const curve = [];
    for (let i = 0; i <= 12; i += 1) curve.push(bezier(from, to, i / 12, this.isVertical));
    return curve;
  }

  wayBack(from, gateway) {
    const edge = 5;
    const [x, y] = gateway.to;
    return this.isVertical
      ? [from, [from[0], from[1] + 8], [edge, from[1] + 8], [edge, y], [x, y]]
      : [from, [from[0] + 14, from[1]], [from[0] + 14, edge], [x, edge], [x, y]];
  }

  drawRail(segments) {
    const { context } = this;
    context.lineWidth = 1.5;
    context.strokeStyle = this.colours.wire;
    context.globalAlpha = 0.35;
    context.beginPath();
    for (const { kind, path } of segments) {
      if (kind === "queue") continue;
      context.moveTo(...path[0]);
      for (const point of path.slice(1)) context.lineTo(...point);
    }
    context.stroke();
    context.globalAlpha = 1;
  }

  drawDots(lane, now) {
    const lap = this.lapMs(lane);
    const weights = weightsOf(lane.session, lane.segments.length);
    const nDots = lane.session.phase === "prefill" ? PREFILL_DOTS : 1;
    for (let i = 0; i < nDots; i += 1) {
      const sinceMs = now - lane.startedMs - (i * lap) / 8;
      if (sinceMs >= 0) this.drawDot(lane.segments, weights, (sinceMs % lap) / lap);
    }
  }

  drawDot(segments, weights, phase) {
    let rest = phase;
    let at = 0;
    while (at < weights.length - 1 && rest >= weights[at]) {
      rest -= weights[at];
      at += 1;
    }
    const { kind, path } = segments[at];
    const [x, y] = pointOn(path, Math.min(1, rest / (weights[at] || 1)));
    const { context } = this;
    context.fillStyle = this.colours[kind];
    context.globalAlpha = 0.2;
    context.beginPath();
    context.arc(x, y, RADIUS * 2.1, 0, 7);
    context.fill();
    context.globalAlpha = 1;
    context.beginPath();
    context.arc(x, y, RADIUS, 0, 7);
    context.fill();
  }
}

/** Shares of a lap: wire, then queue, compute and wire of each stage. */
export function weightsOf(session, nSegments) {
  const measured = [session.first_hop_ms ?? 0];
  for (const stage of session.stages) measured.push(stage.queue_ms, stage.compute_ms, stage.wire_ms);
  const whole = measured.reduce((sum, value) => sum + value, 0);
  if (measured.length !== nSegments || whole <= 0) return new Array(nSegments).fill(1 / nSegments);
  return measured.map((value) => EVEN_SHARE / nSegments + ((1 - EVEN_SHARE) * value) / whole);
}

function bezier([x0, y0], [x1, y1], t, isVertical) {
  const a = (1 - t) ** 3 + 3 * (1 - t) ** 2 * t;
  const even = t;
  const bent = 1 - a;
  return isVertical
    ? [x0 + (x1 - x0) * bent, y0 + (y1 - y0) * even]
    : [x0 + (x1 - x0) * even, y0 + (y1 - y0) * bent];
}

function pointOn(path, share) {
  const lengths = [];
  let whole = 0;
  for (let i = 1; i < path.length; i += 1) {
    const length = Math.hypot(path[i][0] - path[i - 1][0], path[i][1] - path[i - 1][1]);
    lengths.push(length);
    whole += length;
  }
  let rest = share * whole;
  for (let i = 0; i < lengths.length; i += 1) {
    if (rest <= lengths[i] && lengths[i] > 0) {
      const t = rest / lengths[i];
      return [path[i][0] + (path[i + 1][0] - path[i][0]) * t, path[i][1] + (path[i + 1][1] - path[i][1]) * t];
    }
    rest -= lengths[i];
  }
  return path.at(-1);
}
