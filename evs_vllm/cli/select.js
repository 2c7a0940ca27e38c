// SPDX-License-Identifier: Apache-2.0
// Which tokens stay, for the browser: the rules of evs_vllm/core/budget.py and scorers.py, and of select_topk,
// select_threshold, select_hold and select_anchored in evs_kernels. tests/cli/test_html.py compares the two.
"use strict";

const KEPT = 2 ** 31 - 1;  // above every distance
const BLOCK = 32;  // units that select_hold looks at together
const PAIRS = BLOCK * (BLOCK - 1) / 2;

// A decimal written as text, exactly: [numerator, denominator].
function exactDecimal(text) {
  const [whole, fraction = ""] = String(text).split(".");
  return [BigInt(whole + fraction), 10n ** BigInt(fraction.length)];
}

const dividedUp = (numerator, denominator) => (numerator + denominator - 1n) / denominator;

// Decodes what the tokens of a clip are chosen from, once.
// clip: {units, perUnit, stockCount, unit (the score or distance that a threshold counts as 1, a decimal text),
//        evidenceBase64, width, weights (sixteenths by which the changes of each unit count, or null)}
// Adds `scores`, one int32 a token, and their `order` (of rank), or, with a width, `descriptors` of that many bytes.
function prepare(clip) {
  const bytes = Uint8Array.from(atob(clip.evidenceBase64), (c) => c.charCodeAt(0));
  if (clip.width !== null) return Object.assign(clip, {descriptors: bytes});
  const scores = new Int32Array(bytes.buffer);
  if (clip.weights !== null) {
    scores.forEach((score, i) => { scores[i] = score * clip.weights[Math.floor(i / clip.perUnit)] / 16; });
  }
  return Object.assign(clip, {scores, order: rank(scores)});
}

// Flat indices by falling score; a tie goes to the lower index. Score and index are one number below 2**53 while a clip
// has at most 2**22 tokens: typed arrays sort numbers fast.
function rank(scores) {
  const keys = Float64Array.from(scores, (score, i) => (KEPT - score) * scores.length + i).sort();
  return Uint32Array.from(keys, (key) => key % scores.length);
}

// clip: of prepare
// settings: {rate, threshold (decimal texts or null), minPerUnit, maxTokens (or null)}
// Returns a Uint8Array, 1 where a token stays.
function selectTokens(clip, settings) {
  const least = Math.min(settings.minPerUnit, clip.perUnit);
  const level = lowestKept(clip, settings);
  let most = tokenBudget(clip, settings, least);
  if (level !== null) {
    const wanted = clip.descriptors ? walk(clip, level) : reached(clip, level);
    most = Math.min(most, cost(clip, wanted, least));
  }
  let order = clip.order;
  if (clip.descriptors) {
    const held = level === null ? hold(clip, most, least) : anchored(clip, level, most, least);
    order = rank(distances(clip, held));
  }
  return highest(clip, order, most, least);
}

// The number of tokens that stay at most. Of a clip that is short for its rate, at least half of the share of the units
// after the first is kept beside that one.
function tokenBudget({units, perUnit, stockCount}, {rate, maxTokens}, least) {
  const [numerator, denominator] = exactDecimal(rate ?? "0");
  const share = denominator - numerator;
  let budget = Number(BigInt(units * perUnit) * share / denominator);
  if (!stockCount) {
    const others = BigInt((units - 1) * perUnit) * share;
    budget = Math.max(budget, perUnit + Number(dividedUp(others, 2n * denominator)));
  }
  if (maxTokens !== null) budget = Math.min(budget, maxTokens);
  return Math.max(budget, perUnit + (units - 1) * least);
}

// The score or distance from which a token stays, or null without a threshold.
function lowestKept(clip, settings) {
  const [numerator, denominator] = exactDecimal(settings.threshold ?? "0");
  if (numerator === 0n) return null;
  const [unit, unitDenominator] = exactDecimal(clip.unit);
  return Number(dividedUp(numerator * unit, denominator * unitDenominator));
}

// Unit 0, the `least` first of every other unit and the first of all, `most` together.
function highest({units, perUnit}, order, most, least) {
  const kept = new Uint8Array(units * perUnit).fill(1, 0, perUnit);
  const reserved = new Uint32Array(units).fill(perUnit, 0, 1);
  let count = perUnit;
  const keep = (i) => { if (!kept[i]) { kept[i] = 1; count++; } };
  for (const i of order) {
    const unit = Math.floor(i / perUnit);
    if (reserved[unit] < least) { reserved[unit]++; keep(i); }
  }
  for (const i of order) {
    if (count >= most) break;
    keep(i);
  }
  return kept;
}

// Tokens kept, and what every unit lacks of its minimum.
function cost({units, perUnit}, kept, least) {
  let sum = 0;
  for (let unit = 0; unit < units; unit++) {
    let count = 0;
    for (let i = unit * perUnit; i < (unit + 1) * perUnit; i++) count += kept[i];
    sum += Math.max(count, least);
  }
  return sum;
}

// Unit 0 and the scores that reach a level.
function reached({scores, perUnit}, level) {
  return Uint8Array.from(scores, (score, i) => i < perUnit || score >= level);
}

// The lowest of low + 1 .. high that bisection finds to fit, where `low` does not and `high` does.
function lowestThatFits(fits, low, high) {
  while (high - low > 1) {
    const middle = Math.floor((low + high) / 2);
    if (fits(middle)) high = middle; else low = middle;
  }
  return high;
}

// L1 distance of two tokens, by their flat indices, times the weight of the first one's unit.
function distance({descriptors, width, weights, perUnit}, one, other) {
  let sum = 0;
  for (let i = one * width, j = other * width, end = i + width; i < end; i++, j++) {
    sum += Math.abs(descriptors[i] - descriptors[j]);
  }
  return weights === null ? sum : sum * weights[Math.floor(one / perUnit)];
}

// Every token's distance from the last kept one at its place, KEPT where it is kept itself.
function distances(clip, kept) {
  const {perUnit} = clip, scores = new Int32Array(kept.length).fill(KEPT), anchors = new Uint32Array(perUnit);
  for (let i = 0; i < kept.length; i++) {
    if (kept[i]) anchors[i % perUnit] = i; else scores[i] = distance(clip, i, anchors[i % perUnit]);
  }
  return scores;
}

// select_anchored: what the lowest level from `level` on keeps that costs at most `most`.
function anchored(clip, level, most, least) {
  const fits = (level) => cost(clip, walk(clip, level), least) <= most;
  const nothing = 255 * clip.width + 1;
  const low = Math.min(level, nothing);
  return walk(clip, fits(low) ? low : lowestThatFits(fits, low, nothing));
}

// Unit 0, and every token whose distance from the last kept one at its place is at least `level`.
function walk(clip, level) {
  const {units, perUnit} = clip, kept = new Uint8Array(units * perUnit).fill(1, 0, perUnit);
  const anchors = Uint32Array.from({length: perUnit}, (_, p) => p);
  for (let i = perUnit; i < kept.length; i++) {
    if (distance(clip, i, anchors[i % perUnit]) < level) continue;
    kept[i] = 1;
    anchors[i % perUnit] = i;
  }
  return kept;
}

// select_hold: what the lowest price keeps that costs at most `most`.
function hold(clip, most, least) {
  const fits = (number) => cost(clip, heldAt(clip, price(number)), least) <= most;
  let nothing = 0;
  const heaviest = clip.weights === null ? 1 : Math.max(...clip.weights);
  while (price(nothing) <= 255 * clip.width * BLOCK * heaviest) nothing++;
  return heldAt(clip, price(fits(0) ? 0 : lowestThatFits(fits, 0, nothing)));
}

// Price `number` of select_hold: 0, 1, 2, ... 127, then 128, 130, ... 254, 256, 260, ...
function price(number) {
  return number < 128 ? number : (64 + number % 64) * 2 ** (Math.floor(number / 64) - 1);
}

// Where in the sums of a place and block it stands what it costs to hold unit `start` of the block up to `end`
// (excluded), 1 <= start < end - 1.
const pair = (start, end) => (end - 3) * (end - 2) / 2 + start - 1;

// What a token costs that stands for those after it in its block, for every place, block and `pair`.
function holdingSums(clip) {
  const {units, perUnit} = clip, blocks = Math.ceil((units - 1) / BLOCK);
  const sums = new Int32Array(perUnit * blocks * PAIRS);
  for (let place = 0, row = 0; place < perUnit; place++) {
    for (let block = 0; block < blocks; block++, row += PAIRS) {
      const token = (unit) => (block * BLOCK + unit) * perUnit + place;
      const size = Math.min(BLOCK, units - 1 - block * BLOCK);
      for (let end = 3; end <= size + 1; end++) {
        for (let start = 1; start < end - 1; start++) {
          const before = start < end - 2 ? sums[row + pair(start, end - 1)] : 0;
          sums[row + pair(start, end)] = before + distance(clip, token(end - 1), token(start));
        }
      }
    }
  }
  return sums;
}

// The tokens of the lowest cost where a kept one costs `paid`, and a dropped one its distance from the last kept one at
// its place: block after block, by dynamic programming from its end.
function heldAt(clip, paid) {
  const {units, perUnit} = clip, kept = new Uint8Array(units * perUnit).fill(1, 0, perUnit);
  const sums = clip.holdingSums ??= holdingSums(clip);
  // Of what comes after unit `start` of a block, if that is kept: the lowest cost, and the next unit that is kept then.
  const best = new Int32Array(BLOCK + 2), following = new Uint8Array(BLOCK + 2);
  for (let place = 0, row = 0; place < perUnit; place++) {
    let anchor = place;
    for (let first = 0; first < units - 1; first += BLOCK, row += PAIRS) {
      const size = Math.min(BLOCK, units - 1 - first), never = size + 1;
      best[never] = 0;
      for (let start = size; start > 0; start--) {
        // From the latest to the earliest, and only the cheaper replaces: of equal ways the latest stays.
        let lowest = Infinity;
        for (let end = never; end > start; end--) {
          const held = end > start + 1 ? sums[row + pair(start, end)] : 0;
          const sum = held + best[end] + (end < never ? paid : 0);
          if (sum < lowest) { lowest = sum; following[start] = end; }
        }
        best[start] = lowest;
      }
      // The token that stands from the blocks before may be any.
      let turn = 1, lowest = best[1] + paid, held = 0;
      for (let end = 2; end <= never; end++) {
        held += distance(clip, (first + end - 1) * perUnit + place, anchor);
        const sum = held + best[end] + (end < never ? paid : 0);
        if (sum <= lowest) { lowest = sum; turn = end; }
      }
      for (; turn < never; turn = following[turn]) {
        anchor = (first + turn) * perUnit + place;
        kept[anchor] = 1;
      }
    }
  }
  return kept;
}

if (typeof module !== "undefined") module.exports = {prepare, selectTokens};
