(() => {
  "use strict";
  const { runs, glyphs } = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const HEIGHT = 230, TALL = 270, TOP = 10, BOTTOM = 24, RIGHT = 10, GLYPHS = 16, RIBBON = 12;
  const MAX_DOTS = 40; // of a line; more would hide it
  const NEAR = 7; // pixels from an event at which the readout names it
  const settings = { x: "step", log: false, hidden: new Set() };

  const several = runs.length > 1;
  const colour = (run) => `var(--c${run % 8})`;

  function svg(name, attributes, parent) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (parent) parent.append(made);
    return made;
  }

  // ---- numbers

  function digits(value, count = 5) {
    if (value === null || value === undefined) return "–";
    if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en-US");
    const size = Math.abs(value);
    if (size >= 1e15 || (size && size < 1e-4)) return value.toExponential(3).replace(/\.?0+e/, "e");
    return value.toLocaleString("en-US", { maximumSignificantDigits: count });
  }

  function clock(seconds) {
    if (seconds < 60) return `${digits(seconds, 3)} s`;
    const parts = [], whole = Math.round(seconds);
    const units = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
    let rest = whole;
    for (const [size, unit] of units) {
      const count = Math.floor(rest / size);
      rest -= count * size;
      if (count) parts.push(`${count} ${unit}`);
      else if (parts.length) break;
    }
    return parts.slice(0, 2).join(" ");
  }

  const X_NAMES = {
    step: (value) => `step ${digits(value)}`,
    epoch: (value) => `epoch ${digits(value, 4)}`,
    time: (value) => clock(value),
  };

  function ticks(low, high, count) {
    const raw = (high - low) / Math.max(1, count) || 1;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= raw * 0.999);
    const found = [];
    for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n += 1) {
      found.push(Number((n * step).toPrecision(12)));
    }
    return found;
  }

  function timeTicks(high, count) {
    const sizes = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400];
    const step = sizes.find((size) => high / size <= count) ?? 86400 * Math.ceil(high / 86400 / count);
    const found = [];
    for (let at = 0; at <= high; at += step) found.push(at);
    return high < 2 ? ticks(0, high, count) : found;
  }

  function logTicks(low, high) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
      for (const factor of [1, 2, 5]) {
        const value = Number((factor * 10 ** power).toPrecision(3));
        if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
      }
    }
    return found.length > 8 ? found.filter((value) => /^[1]/.test(value.toExponential())) : found;
  }

  // ---- what is drawn

  function curve(run, name, xName, { lost = false } = {}) {
    return runs[run].curves.segments
      .filter((segment) => segment[name] && (segment.kept || lost))
      .map((segment) => ({
        x: segment[xName], y: segment[name], low: segment[`${name}_low`], high: segment[`${name}_high`],
        faint: !segment.kept,
      }));
  }

  // what is measured in some steps only, without the others
  function sparse(run, name, xName) {
    return curve(run, name, xName).map(({ x, y, low, high }) => {
      const there = (_, i) => y[i] !== null;
      return { x: x.filter(there), y: y.filter(there), low: low?.filter(there), high: high?.filter(there) };
    });
  }

  function scores(run, name, xName) {
    const rows = runs[run].validations.filter((row) => typeof row[name] === "number" && row[xName] !== null);
    return rows.length ? [{ x: rows.map((row) => row[xName]), y: rows.map((row) => row[name]), dots: rows.length <= MAX_DOTS }] : [];
  }

  function lines(names, from, options) {
    return runs.flatMap((_, run) => names.map(([name, label, dashed]) => ({
      run, label, dashed, colour: colour(run), segments: from(run, name, options.x, options),
    }))).filter((line) => line.segments.length && !settings.hidden.has(line.run));
  }

  const CHARTS = {
    loss: {
      y: "loss", log: true,
      lines: () => lines([["loss", "loss"]], curve, { x: settings.x }),
    },
    accuracy: {
      y: "accuracy", unit: " %", zero: true, most: 100,
      lines: () => lines([["top1", "top-1"], ["top5", "top-5", true]], scores, { x: settings.x }),
    },
    lr: { y: "learning rate", zero: true, lines: () => lines([["lr", "lr"]], curve, { x: settings.x }) },
    gradient: {
      y: "gradient norm", log: true,
      lines: () => lines([["grad_norm", "gradient norm"]], sparse, { x: settings.x }),
    },
    throughput: {
      y: "images/s", zero: true, x: "time", tall: true, events: true,
      lines: () => lines([["images_per_s", "images/s"]], curve, { x: "time", lost: true }),
    },
  };

  // ---- drawing

  function domain(drawn, chart, log) {
    let low = Infinity, high = -Infinity;
    for (const line of drawn) {
      for (const { y, low: lows, high: highs } of line.segments) {
        for (let i = 0; i < y.length; i += 1) {
          if (y[i] === null) continue;
          const least = lows ? lows[i] : y[i], most = highs ? highs[i] : y[i];
          if (!log || least > 0) low = Math.min(low, least);
          high = Math.max(high, most);
        }
      }
    }
    if (!Number.isFinite(high)) return [0, 1];
    if (log) return low > 0 && low < high ? [low, high] : [high / 10 || 0.1, high * 1.1 || 1];
    if (chart.zero) low = Math.min(0, low);
    const pad = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1;
    return [chart.zero ? low : low - pad, chart.most ? Math.min(chart.most, high + pad) : high + pad];
  }

  function paths(segment, toX, toY) {
    const edge = [], upper = [], lower = [];
    let pen = "M";
    const bands = [];
    const close = () => {
      if (upper.length > 1) bands.push(`M${upper.join("L")}L${lower.reverse().join("L")}Z`);
      upper.length = 0; lower.length = 0;
    };
    segment.y.forEach((value, i) => {
      if (value === null) { pen = "M"; close(); return; }
      const x = toX(segment.x[i]).toFixed(1);
      edge.push(`${pen}${x},${toY(value).toFixed(1)}`);
      pen = "L";
      if (segment.low) {
        upper.push(`${x},${toY(segment.high[i]).toFixed(1)}`);
        lower.push(`${x},${toY(segment.low[i]).toFixed(1)}`);
      }
    });
    close();
    return { edge: edge.join(""), bands };
  }

  const glyphClass = (what) => (what === "done" ? "done-mark" : what);

  function drawEvents(plot, toX, top, bottom, shown) {
    let free = -Infinity;
    for (const { event, run } of shown) {
      const x = toX(event.time), kind = glyphClass(event.what);
      svg("line", { x1: x, x2: x, y1: top, y2: bottom, class: `mark ${kind}` }, plot);
      if (x < free) continue; // glyphs would cover each other; the readout and the table have them all
      svg("path", { d: glyphs[event.what], class: `glyph ${kind}`, transform: `translate(${x},${top - 8})` }, plot);
      free = x + 9;
    }
  }

  function drawRibbons(plot, toX, top, visible) {
    visible.forEach((run, row) => {
      const y = top + row * (RIBBON + 3);
      runs[run].starts.forEach((start, number) => {
        if (start.time === null || start.end_time === null) return;
        const x = toX(start.time), width = Math.max(1, toX(start.end_time) - x);
        svg("rect", { x, y, width, height: RIBBON, rx: 2, class: `attempt${number % 2 ? " odd" : ""}`,
          ...(several ? { style: `fill:${colour(run)}` } : {}) }, plot);
        const name = String(start.start);
        if (width > 8 + 7 * name.length) svg("text", { x: x + 4, y: y + 9.5, style: "font-size:10px;fill:var(--ink)" }, plot).textContent = name;
      });
    });
  }

  function draw(figure) {
    const chart = CHARTS[figure.dataset.chart];
    const xName = chart.x ?? settings.x, log = Boolean(chart.log && settings.log);
    const drawn = chart.lines();
    const visible = runs.map((_, run) => run).filter((run) => !settings.hidden.has(run));
    const plot = figure.querySelector("svg");
    const width = Math.max(240, plot.parentElement.clientWidth);
    const ribbons = chart.events ? visible.length * (RIBBON + 3) + 4 : 0;
    const height = (chart.tall ? TALL : HEIGHT) + ribbons;
    plot.replaceChildren();
    plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
    plot.setAttribute("height", height);

    const events = chart.events
      ? visible.flatMap((run) => runs[run].events.filter((event) => event.time !== null).map((event) => ({ event, run })))
          .sort((a, b) => a.event.time - b.event.time)
      : [];
    const top = TOP + (events.length ? GLYPHS : 0), bottom = height - BOTTOM - ribbons;
    const [low, high] = domain(drawn, chart, log);
    const yTicks = log ? logTicks(low, high) : ticks(low, high, 4);
    const labels = yTicks.map((value) => digits(value) + (chart.unit ?? ""));
    const left = 10 + 6.6 * Math.max(2, ...labels.map((label) => label.length));

    const xs = drawn.flatMap((line) => line.segments.flatMap((segment) => segment.x)).filter((x) => x !== null);
    let first = xName === "time" ? 0 : Infinity, last = -Infinity;
    for (const x of xs) { first = Math.min(first, x); last = Math.max(last, x); }
    for (const { event } of events) last = Math.max(last, event.time);
    if (!(last > first)) { first = Number.isFinite(last) ? Math.min(first, last - 1) : 0; last = Math.max(first + 1, last); }
    const toX = (x) => left + ((x - first) / (last - first)) * (width - left - RIGHT);
    const scale = log ? (y) => Math.log10(Math.max(y, low)) : (y) => y;
    const toY = (y) => bottom - ((scale(y) - scale(low)) / (scale(high) - scale(low))) * (bottom - top);

    yTicks.forEach((value, i) => {
      const y = Math.round(toY(value)) + 0.5;
      svg("line", { x1: left, x2: width - RIGHT, y1: y, y2: y, class: "grid" }, plot);
      svg("text", { x: left - 7, y: y + 4, "text-anchor": "end" }, plot).textContent = labels[i];
    });
    const room = Math.max(2, Math.floor((width - left) / 75));
    const xTicks = xName === "time" ? timeTicks(last, room) : ticks(first, last, room);
    xTicks.forEach((value, i) => {
      if (xName === "step" && !Number.isInteger(value)) return;
      const x = toX(value), text = xName === "time" ? clock(value) : digits(value);
      const anchor = x < left + 8 ? "start" : x > width - RIGHT - 16 ? "end" : "middle";
      svg("text", { x, y: height - 6, "text-anchor": anchor }, plot).textContent = text;
    });
    if (!drawn.length) svg("text", { x: left, y: (top + bottom) / 2 }, plot).textContent = "nothing recorded yet";

    drawEvents(plot, toX, top, bottom, events);
    if (chart.events) {
      for (const run of visible) {
        for (const { time } of runs[run].checkpoints) {
          if (time !== null) svg("line", { x1: toX(time), x2: toX(time), y1: bottom - 5, y2: bottom, class: "mark checkpoint" }, plot);
        }
      }
      drawRibbons(plot, toX, bottom + 6, visible);
    }
    for (const line of drawn) {
      for (const segment of line.segments) {
        const { edge, bands } = paths(segment, toX, toY);
        for (const band of bands) svg("path", { d: band, class: "band", style: `fill:${line.colour}` }, plot);
        const faint = segment.faint ? " faint" : "";
        const dash = line.dashed ? ";stroke-dasharray:5 4" : "";
        svg("path", { d: edge, class: `line${faint}`, style: `stroke:${line.colour}${dash}` }, plot);
        if (segment.dots || segment.y.length === 1) {
          segment.y.forEach((y, i) => {
            if (y !== null) svg("circle", { cx: toX(segment.x[i]), cy: toY(y), r: segment.dots ? 2.6 : 2, style: `fill:${line.colour}` }, plot);
          });
        }
      }
    }
    const cursor = svg("line", { y1: top, y2: bottom, class: "cursor", visibility: "hidden" }, plot);
    figure.state = { drawn, events, toX, left, width, cursor, chart, xName, at: null };
  }

  // ---- reading a chart, by pointer or by keys

  function nearest(line, x) {
    let best = null;
    for (const segment of line.segments) {
      if (segment.faint && best) continue;
      let from = 0, to = segment.x.length - 1;
      while (from < to) {
        const middle = (from + to) >> 1;
        if (segment.x[middle] < x) from = middle + 1; else to = middle;
      }
      for (const i of [from - 1, from]) {
        if (i < 0 || segment.y[i] === null || segment.y[i] === undefined) continue;
        const distance = Math.abs(segment.x[i] - x);
        if (!best || distance < best.distance) best = { distance, segment, i };
      }
    }
    return best;
  }

  function read(figure, x) {
    const { drawn, events, toX, cursor, chart, xName } = figure.state;
    const out = figure.querySelector(".readout");
    const points = drawn.map((line) => ({ line, point: nearest(line, x) })).filter(({ point }) => point);
    if (!points.length) return;
    const found = points.reduce((a, b) => (b.point.distance < a.point.distance ? b : a)).point;
    const at = found.segment.x[found.i];
    figure.state.at = at;
    cursor.setAttribute("x1", toX(at)); cursor.setAttribute("x2", toX(at));
    cursor.setAttribute("visibility", "visible");
    out.replaceChildren(X_NAMES[xName](at));
    for (const { line, point } of points) {
      const value = point.segment.y[point.i];
      const bold = document.createElement("b");
      bold.textContent = digits(value) + (chart.unit ?? "");
      const name = several ? `${runs[line.run].name}${drawn.some((other) => other.run === line.run && other !== line) ? ` ${line.label}` : ""}` : line.label;
      out.append(` · ${name} `, bold);
      const { low, high } = point.segment;
      if (low && low[point.i] !== high[point.i]) out.append(` (${digits(low[point.i])} to ${digits(high[point.i])})`);
      if (point.segment.faint) out.append(" (work lost)");
    }
    const close = events.filter(({ event }) => Math.abs(toX(event.time) - toX(x)) < NEAR);
    for (const { event, run } of close.slice(0, 3)) {
      out.append(` · ${several ? `${runs[run].name}: ` : ""}${event.what}: ${event.text}`);
    }
    if (close.length > 3) out.append(` · and ${close.length - 3} more`);
  }

  function rest(figure) {
    figure.state.cursor.setAttribute("visibility", "hidden");
    figure.querySelector(".readout").replaceChildren();
    figure.state.at = null;
  }

  function step(figure, event) {
    const { drawn, events, at } = figure.state;
    if (!drawn.length) return;
    const xs = drawn[0].segments.flatMap((segment) => (segment.faint ? [] : segment.x));
    const marks = events.map(({ event: mark }) => mark.time);
    let index = at === null ? -1 : xs.findIndex((x) => x >= at);
    if (at !== null && index < 0) index = xs.length - 1;
    const far = event.shiftKey ? 10 : 1;
    const target = {
      ArrowRight: () => xs[Math.min(xs.length - 1, index + far)],
      ArrowLeft: () => xs[Math.max(0, index < 0 ? xs.length - 1 : index - far)],
      Home: () => xs[0],
      End: () => xs[xs.length - 1],
      ArrowDown: () => marks.find((time) => time > (figure.state.mark ?? -1)),
      ArrowUp: () => [...marks].reverse().find((time) => time < (figure.state.mark ?? Infinity)),
    }[event.key];
    if (event.key === "Escape") rest(figure);
    if (!target) return;
    const x = target();
    if (x === undefined) return;
    event.preventDefault();
    figure.state.mark = event.key.endsWith("Down") || event.key.endsWith("Up") ? x : undefined;
    read(figure, x);
  }

  function follow(figure) {
    const plot = figure.querySelector("svg");
    const move = (event) => {
      const { left, width } = figure.state;
      const box = plot.getBoundingClientRect();
      const pixel = ((event.clientX - box.left) / box.width) * width;
      const [from, to] = [figure.state.toX(0), figure.state.toX(1)];
      if (pixel >= left - 5) read(figure, (pixel - from) / (to - from));
    };
    plot.addEventListener("pointermove", move);
    plot.addEventListener("pointerdown", move);
    plot.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") rest(figure); });
    plot.addEventListener("keydown", (event) => step(figure, event));
    plot.addEventListener("blur", () => rest(figure));
  }

  // ---- start

  const figures = [...document.querySelectorAll("figure[data-chart]")];
  const redraw = () => figures.forEach(draw);
  for (const figure of figures) follow(figure);
  for (const input of document.querySelectorAll("input[name=x]")) {
    input.addEventListener("change", () => { settings.x = input.value; redraw(); });
    if (input.checked) settings.x = input.value;
  }
  for (const input of document.querySelectorAll("input[name=log]")) {
    input.addEventListener("change", () => { settings.log = input.checked; redraw(); });
    settings.log = input.checked;
  }
  for (const input of document.querySelectorAll("input[name=run]")) {
    const apply = () => { settings.hidden[input.checked ? "delete" : "add"](Number(input.value)); };
    input.addEventListener("change", () => { apply(); redraw(); });
    apply();
  }
  let seen = 0;
  new ResizeObserver(() => {
    const width = document.documentElement.clientWidth;
    if (width !== seen) { seen = width; redraw(); }
  }).observe(document.documentElement);
  redraw();
})();
