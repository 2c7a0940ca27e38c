// SPDX-License-Identifier: Apache-2.0
// The selection rule of evs_vllm/select.py and evs_kernels, for the browser. tests/cli/test_html.py compares the two.
"use strict";

// A decimal written as text, exactly: [numerator, denominator].
function exactDecimal(text) {
  const [whole, fraction = ""] = String(text).split(".");
  return [BigInt(whole + fraction), 10n ** BigInt(fraction.length)];
}

// Flat indices by falling score; a tie goes to the lower index.
function rank(scores) {
  return Uint32Array.from(scores.keys()).sort((a, b) => scores[b] - scores[a] || a - b);
}

// clip: {scores, order (of rank), units, perUnit, values (pixel values per token)}
// settings: {rate, threshold (decimal texts or null), minPerUnit, maxTokens (or null)}
// Returns a Uint8Array, 1 where a token stays.
function selectTokens(clip, settings) {
  const {scores, order, units, perUnit} = clip;
  const total = units * perUnit;
  const least = Math.min(settings.minPerUnit, perUnit);
  const kept = new Uint8Array(total).fill(1, 0, perUnit);
  const reserved = new Uint32Array(units).fill(perUnit, 0, 1);
  let count = perUnit;
  const keep = (i) => { if (!kept[i]) { kept[i] = 1; count++; } };
  for (const i of order) {
    const unit = Math.floor(i / perUnit);
    if (reserved[unit] < least) { reserved[unit]++; keep(i); }
  }
  let budget;
  if (settings.threshold !== null && exactDecimal(settings.threshold)[0] > 0n) {
    const [numerator, denominator] = exactDecimal(settings.threshold);
    const lowest = Number((numerator * BigInt(clip.values) + denominator - 1n) / denominator);
    const all = kept.slice();
    let allCount = count;
    for (let i = 0; i < total; i++) if (!all[i] && scores[i] >= lowest) { all[i] = 1; allCount++; }
    if (settings.maxTokens === null || allCount <= settings.maxTokens) return all;
    budget = settings.maxTokens;
  } else {
    const [numerator, denominator] = exactDecimal(settings.rate === null ? "0" : settings.rate);
    budget = Number(BigInt(total) * (denominator - numerator) / denominator);
    if (settings.maxTokens !== null) budget = Math.min(budget, settings.maxTokens);
  }
  for (const i of order) {
    if (count >= budget) break;
    keep(i);
  }
  return kept;
}

if (typeof module !== "undefined") module.exports = {exactDecimal, rank, selectTokens};
