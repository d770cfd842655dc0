// What the charts draw: runs with their numbers unpacked, and their buckets put together to larger ones.

function places(packed) {
  return { steps: unpack(packed.steps), tokens: unpack(packed.tokens), hours: unpack(packed.hours) };
}

function decoded(run) {
  const figures = {};
  for (const [name, figure] of Object.entries(run.steps.figures)) {
    const mean = unpack(figure.mean);
    figures[name] = { mean, low: figure.low ? unpack(figure.low) : mean, high: figure.high ? unpack(figure.high) : mean };
  }
  const points = found => Object.fromEntries(Object.entries(found).map(([name, each]) =>
    [name, { ...places(each), value: unpack(each.value), low: unpack(each.low), high: unpack(each.high) }]));
  const { happenings, tokens, hours } = run.timeline;
  const modules = run.modules && {
    ...places(run.modules), names: run.modules.modules, first: unpack(run.modules.first),
    norms: unpack(run.modules.norms, Float32Array),
  };
  return {
    ...run,
    at: places(run.steps), counts: unpack(run.steps.counts), figures,
    givenUp: run.given_up.map(each => ({ ...places(each), loss: unpack(each.loss) })),
    heldOut: points(run.held_out), differences: points(run.differences),
    timeline: { happenings, steps: happenings.map(each => each.step), tokens: unpack(tokens), hours: unpack(hours) },
    modules,
  };
}

// One figure of a run over an axis, `together` buckets in a point: mean, lowest, highest, first and last step.
function grouped(run, name, axis, together) {
  const { mean, low, high } = run.figures[name];
  const { at, counts } = run;
  const size = Math.ceil(mean.length / together);
  const made = { x: new Float64Array(size), y: new Array(size), low: new Array(size), high: new Array(size), last: new Array(size), count: new Array(size) };
  for (let point = 0; point < size; point++) {
    const end = Math.min(mean.length, (point + 1) * together);
    let sum = 0, weight = 0, least = Infinity, most = -Infinity, steps = 0;
    for (let place = point * together; place < end; place++) {
      steps += counts[place];
      if (Number.isNaN(mean[place])) continue;
      sum += mean[place] * counts[place];
      weight += counts[place];
      least = Math.min(least, low[place]);
      most = Math.max(most, high[place]);
    }
    made.x[point] = at[axis][end - 1];
    made.y[point] = weight ? sum / weight : null;
    made.low[point] = weight ? least : null;
    made.high[point] = weight ? most : null;
    made.last[point] = at.steps[end - 1];
    made.count[point] = steps;
  }
  return made;
}

const orNull = values => Array.from(values, value => Number.isFinite(value) ? value : null);

// Points with intervals, like held-out figures.
function pointed(points, axis) {
  return { x: points[axis], y: orNull(points.value), low: orNull(points.low), high: orNull(points.high), last: points.steps, count: null };
}

// How many buckets a point may have: up to so many that ten points are left.
function choicesOf(runs) {
  const most = Math.max(1, ...runs.map(run => run.counts.length));
  return [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000].filter(factor => factor === 1 || most / factor >= 10);
}
