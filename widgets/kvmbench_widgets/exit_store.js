// The exits that a page has, a column of each number for each lane, and sums over blocks of them: what any stretch of
// time held is found by two look-ups and two short walks, whatever the number of exits.

// Rows of a block; of the latencies, which are fewer numbers a row.
const BLOCK = 16, BIN_BLOCK = 1024;
// Latencies are counted in buckets: 16 to a decade, from 1 ns to 1000 s.
export const BINS = 192;
export const A_DECADE = 16;
const NO_BIN = 255;
// Kinds of time: guest, guest and KVM together, standing; then two for each reason: in KVM, in user space.
export const GUEST = 0;
export const TOGETHER = 1;
export const OUTSIDE = 2;
export const FIRST = 3;
const KINDS = { time: Float64Array, guest: Float32Array, before: Float32Array, user: Float32Array, outside: Float32Array, after: Float32Array, reason: Uint8Array, row: Uint32Array, bin: Uint8Array };
const SENT = [Float64Array, Float32Array, Float32Array, Float32Array, Float32Array, Float32Array, Uint8Array, Uint16Array];

const grown = (array, size) => {
  const made = new array.constructor(size);
  made.set(array.length > size ? array.subarray(0, size) : array);
  return made;
};
// The first of n ascending numbers that is greater; it is known not to be before `low`.
const above = (array, n, x, low = 0) => {
  let high = n;
  for (let step = 1; low + step < n && low > 0; step *= 2) {
    if (array[low + step] <= x) continue;
    high = low + step;
    break;
  }
  while (low < high) {
    const middle = (low + high) >> 1;
    if (array[middle] <= x) low = middle + 1;
    else high = middle;
  }
  return low;
};

function lane(reasons) {
  const columns = Object.fromEntries(Object.entries(KINDS).map(([name, kind]) => [name, new kind(0)]));
  const kinds = FIRST + 2 * reasons.length;
  return { ...columns, n: 0, kinds, done: 0, sums: new Float64Array(kinds), counts: new Uint32Array(reasons.length), bins: null };
}

// One row's time is added to what `sums` has from `at` on, or taken off.
function add(each, n, together, sums, at, sign) {
  const reason = each.reason[n], kind = at + FIRST + 2 * reason, after = each.after[n];
  sums[at + (together[reason] ? TOGETHER : GUEST)] += sign * each.guest[n];
  sums[kind] += sign * (each.before[n] + (after > 0 ? after : 0));
  sums[kind + 1] += sign * each.user[n];
  sums[at + OUTSIDE] += sign * each.outside[n];
}

// store(): the exits; reasons() sets what there is before take() brings rows.
export function store() {
  let lanes = [], names = [], together = [], shown = [];
  const self = {
    n: 0, version: 0, total: 0, start: 0, end: 1,
    lanes: () => lanes,
    // Numbers of reasons never change, there only come more: then the sums are made anew.
    reasons(list, laneCount) {
      if (list.length !== names.length) {
        names = list.map((each) => each.name);
        together = list.map((each) => each.together);
        shown = names.map((_, n) => shown[n] ?? true);
        for (const each of lanes) {
          Object.assign(each, lane(names), Object.fromEntries(Object.keys(KINDS).map((name) => [name, each[name]])), { n: each.n });
          sum(each);
        }
      }
      while (lanes.length < laneCount) lanes.push(lane(names));
    },
    show(flags) {
      shown = flags;
      for (const each of lanes) each.bins = null;
    },
    // A message of rows; false if it is not the next one.
    take({ version, first, count, total }, buffers, sizes) {
      if (first > self.n) return false;
      if (first < self.n) cut(first);
      const [time, guest, before, user, outside, after, reason, of] = buffers.map((buffer, n) => new SENT[n](copied(buffer)));
      for (let n = 0; n < count; n++) {
        const each = lanes[of[n]];
        if (!each || reason[n] >= names.length) return false;
        if (each.n === each.time.length) {
          const size = Math.max(1024, sizes[of[n]] ?? 0, each.n + (each.n >> 2));
          for (const name of Object.keys(KINDS)) each[name] = grown(each[name], size);
        }
        const at = each.n++;
        each.time[at] = time[n];
        each.guest[at] = guest[n];
        each.before[at] = before[n];
        each.user[at] = user[n];
        each.outside[at] = outside[n];
        each.after[at] = after[n];
        each.reason[at] = reason[n];
        each.row[at] = first + n;
        const took = user[n] + (together[reason[n]] ? 0 : before[n] + after[n]);
        each.bin[at] = after[n] < 0 || took < 1 ? NO_BIN : Math.min(BINS - 1, Math.floor(Math.log10(took) * A_DECADE));
      }
      Object.assign(self, { n: first + count, version, total });
      for (const each of lanes) sum(each);
      self.start = Math.min(...lanes.filter((each) => each.n).map((each) => each.time[0] - each.guest[0]));
      self.end = Math.max(self.start + 1, ...lanes.filter((each) => each.n).map((each) => ends(each, each.n - 1)));
      if (!self.n) [self.start, self.end] = [0, 1];
      return true;
    },
    // The first row of a lane that was left after x.
    after: (each, x) => above(each.time, each.n, x),
    ends,
    // Shares of time and counts of exits by reason, of `width` columns between two moments. A column costs what lies in
    // it: of few exits each, of many the blocks, and at its edges what of an exit is before them.
    columns(each, from, to, width, shares, counts) {
      const { kinds, time, n: many } = each, reasons = names.length, step = (to - from) / width;
      shares.fill(0, 0, width * kinds);
      counts.fill(0, 0, width * reasons);
      let next = above(time, many, from);
      for (let column = 0; column < width; column++) {
        const at = column * kinds, right = from + step * (column + 1), first = next;
        edge(each, first, right - step, shares, at, -1);
        if (next < many && time[next] <= right) {
          next = above(time, many, right, next);
          // The exit at an edge is counted with those of the column that it is in; its time is the edge's part.
          between(each, Math.max(0, first - 1), Math.max(0, next - 1), shares, at);
          count(each, first, next, counts, column * reasons);
        }
        edge(each, next, right, shares, at, 1);
        for (let kind = at; kind < at + kinds; kind++) shares[kind] /= step;
      }
    },
    // How many exits took how long, of those shown in all lanes between two moments.
    latencies(from, to) {
      const found = new Float64Array(BINS);
      for (const each of lanes) {
        if (!each.bins) bin(each);
        tally(each, above(each.time, each.n, to), found, 1);
        tally(each, above(each.time, each.n, from), found, -1);
      }
      return found;
    },
    // Bytes held, for those who measure.
    bytes: () => lanes.reduce((sofar, each) => sofar + [...Object.keys(KINDS), "sums", "counts", "bins"].reduce((sum, name) => sum + (each[name]?.byteLength ?? 0), 0), 0),
  };
  // anywidget gives a DataView into a message, which need not begin at a multiple of 8.
  const copied = (buffer) => (buffer.buffer ?? buffer).slice(buffer.byteOffset ?? 0, (buffer.byteOffset ?? 0) + buffer.byteLength);
  function ends(each, n) {
    return each.time[n] + each.before[n] + each.user[n] + each.outside[n] + Math.max(0, each.after[n]);
  }
  // What is past at a moment of the two rows that it may lie in: of the exit before it, of the guest's time before the next.
  function edge(each, next, x, sums, at, sign) {
    if (next > 0) {
      const n = next - 1, reason = each.reason[n], kind = at + FIRST + 2 * reason;
      sums[at + (together[reason] ? TOGETHER : GUEST)] += sign * each.guest[n];
      let left = x - each.time[n];
      const first = Math.min(left, each.before[n]), user = Math.min((left -= first), each.user[n]);
      const outside = Math.min((left -= user), each.outside[n]), after = Math.min(left - outside, Math.max(0, each.after[n]));
      sums[kind] += sign * (first + after);
      sums[kind + 1] += sign * user;
      sums[at + OUTSIDE] += sign * outside;
    }
    if (next < each.n) {
      const past = x - each.time[next] + each.guest[next];
      if (past > 0) sums[at + (together[each.reason[next]] ? TOGETHER : GUEST)] += sign * past;
    }
  }
  // The times of rows `first` to `last`, or how many there are of each reason: by blocks, from the nearest at either end.
  const nearest = (each, row) => Math.min(Math.round(row / BLOCK), each.done);
  function between(each, first, last, sums, at) {
    const { kinds } = each, low = nearest(each, first), high = nearest(each, last);
    if (low >= high) return walk(each, first, last, sums, at);
    for (let kind = 0; kind < kinds; kind++) sums[at + kind] += each.sums[high * kinds + kind] - each.sums[low * kinds + kind];
    walk(each, first, low * BLOCK, sums, at);
    walk(each, high * BLOCK, last, sums, at);
  }
  function walk(each, from, to, sums, at) {
    for (let n = from; n < to; n++) add(each, n, together, sums, at, 1);
    for (let n = to; n < from; n++) add(each, n, together, sums, at, -1);
  }
  function count(each, first, last, counts, at) {
    const many = names.length, low = nearest(each, first), high = nearest(each, last);
    const stroll = (from, to) => {
      for (let n = from; n < to; n++) counts[at + each.reason[n]]++;
      for (let n = to; n < from; n++) counts[at + each.reason[n]]--;
    };
    if (low >= high) return stroll(first, last);
    for (let reason = 0; reason < many; reason++) counts[at + reason] += each.counts[high * many + reason] - each.counts[low * many + reason];
    stroll(first, low * BLOCK);
    stroll(high * BLOCK, last);
  }
  function cut(row) {
    for (const each of lanes) {
      each.n = row === 0 ? 0 : above(each.row, each.n, row - 1);
      each.done = Math.min(each.done, each.n / BLOCK | 0);
      each.bins = null;
    }
    self.n = row;
  }
  // Sums of each block that is full now: what all before it come to.
  function sum(each) {
    const blocks = each.n / BLOCK | 0, { kinds } = each, many = names.length;
    each.bins = null;
    if ((blocks + 1) * kinds > each.sums.length) {
      const room = Math.max(blocks, each.time.length / BLOCK | 0) + 1;
      each.sums = grown(each.sums, room * kinds);
      each.counts = grown(each.counts, room * many);
    }
    for (; each.done < blocks; each.done++) {
      const from = each.done, to = from + 1;
      each.sums.copyWithin(to * kinds, from * kinds, to * kinds);
      each.counts.copyWithin(to * many, from * many, to * many);
      const sums = each.sums.subarray(to * kinds, (to + 1) * kinds);
      for (let n = from * BLOCK; n < to * BLOCK; n++) {
        add(each, n, together, sums, 0, 1);
        each.counts[to * many + each.reason[n]]++;
      }
    }
  }
  function bin(each) {
    const blocks = each.n / BIN_BLOCK | 0;
    each.bins = new Uint32Array((blocks + 1) * BINS);
    for (let block = 0; block < blocks; block++) {
      each.bins.copyWithin((block + 1) * BINS, block * BINS, (block + 1) * BINS);
      for (let n = block * BIN_BLOCK; n < (block + 1) * BIN_BLOCK; n++) {
        if (each.bin[n] !== NO_BIN && shown[each.reason[n]]) each.bins[(block + 1) * BINS + each.bin[n]]++;
      }
    }
  }
  function tally(each, row, found, sign) {
    const block = row / BIN_BLOCK | 0;
    for (let bin = 0; bin < BINS; bin++) found[bin] += sign * each.bins[block * BINS + bin];
    for (let n = block * BIN_BLOCK; n < row; n++) {
      if (each.bin[n] !== NO_BIN && shown[each.reason[n]]) found[each.bin[n]] += sign;
    }
  }
  return self;
}
