// The ProAC loss and its gradient, term by term, for the page. The equation numbers are those of csrc/README.md; a test compares the
// result with the package's reference in float64.
"use strict";

const ProAC = (() => {
  const dot = (a, b) => a.reduce((sum, value, d) => sum + value * b[d], 0);
  const unit = (v) => v.map((value) => value / Math.sqrt(dot(v, v)));

  function logSumExp(values) {
    const top = Math.max(...values);
    return top + Math.log(values.reduce((sum, value) => sum + Math.exp(value - top), 0));
  }

  // softplus(x) = log(1 + exp(x)) and its derivative, without overflow
  const softplus = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));
  const sigmoid = (x) => (x >= 0 ? 1 / (1 + Math.exp(-x)) : Math.exp(x) / (1 + Math.exp(x)));

  // The M pixels of other classes with the smallest random keys, or all of them: N_k of (2)
  function negatives(labels, k, keys, count) {
    const others = labels.map((_, i) => i).filter((i) => labels[i] !== k);
    if (count === undefined) return others;
    return others.sort((i, j) => keys[i] - keys[j] || i - j).slice(0, count);
  }

  // features: N rows of D numbers; labels: N classes; prototypes: K rows of D. sampling: {keys, count}, or nothing for all negatives.
  // Returns the loss, and of each class: its loss (null where it has no pixels or no negatives), log Z, N_k and the share of each
  // negative in Z; the similarities S, and the gradient of the loss with respect to the features.
  function loss(features, labels, prototypes, temperature, sampling = {}) {
    const directions = features.map(unit);
    const anchors = prototypes.map(unit);
    const similarity = anchors.map((p) => directions.map((x) => dot(p, x) / temperature)); // (1)
    const classes = anchors.map((_, k) => {
      const own = labels.map((_, i) => i).filter((i) => labels[i] === k);
      const others = negatives(labels, k, sampling.keys, sampling.count);
      if (!own.length || !others.length) return {loss: null, logZ: null, own, others, shares: []};
      const logZ = logSumExp(others.map((j) => similarity[k][j])); // (3)
      const total = own.reduce((sum, i) => sum + softplus(logZ - similarity[k][i]), 0);
      const shares = others.map((j) => Math.exp(similarity[k][j] - logZ));
      return {loss: total / own.length, logZ, own, others, shares}; // (4)
    });
    const kept = classes.filter((c) => c.loss !== null);
    const value = kept.reduce((sum, c) => sum + c.loss, 0) / Math.max(1, kept.length); // (6)

    const toSimilarity = anchors.map(() => features.map(() => 0));
    classes.forEach((c, k) => {
      if (c.loss === null) return;
      const factor = 1 / kept.length;
      const pulls = c.own.map((i) => sigmoid(c.logZ - similarity[k][i]) / c.own.length);
      c.own.forEach((i, n) => (toSimilarity[k][i] -= factor * pulls[n])); // (8)
      const push = pulls.reduce((sum, q) => sum + q, 0); // (7)
      c.others.forEach((j, n) => (toSimilarity[k][j] += factor * push * c.shares[n])); // (9)
    });
    const gradient = features.map((x, i) => {
      const g = x.map((_, d) => anchors.reduce((sum, p, k) => sum + toSimilarity[k][i] * p[d], 0) / temperature);
      const along = dot(g, directions[i]);
      return g.map((value, d) => (value - along * directions[i][d]) / Math.sqrt(dot(x, x))); // (11)
    });
    return {value, classes, similarity, gradient};
  }

  return {dot, unit, loss};
})();
