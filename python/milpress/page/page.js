"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

  // Text goes in as text nodes only: nothing that a file says is ever parsed as markup.
  const fill = (node, attributes, children) => {
    for (const [key, value] of Object.entries(attributes || {})) {
      if (key === "on")
        for (const [event, act] of Object.entries(value)) node.addEventListener(event, act);
      else if (value !== null && value !== undefined && value !== false)
        node.setAttribute(key, value === true ? "" : String(value));
    }
    node.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return node;
  };
  const h = (tag, attributes, ...children) =>
    fill(document.createElement(tag), attributes, children);
  const s = (tag, attributes, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
  const button = (attributes, act, ...children) =>
    h("button", { type: "button", on: { click: act }, ...attributes }, ...children);
  const line = (kind, x1, x2, y1, y2) => s("line", { class: kind, x1, x2, y1, y2 });
  const words = (x, y, anchor, text, attributes) =>
    s("text", { x, y, "text-anchor": anchor, ...attributes }, text);

  const FAMILIES = {
    original: "Original",
    palette: "Palette",
    integer: "Integer codes",
    pruned: "Pruned",
    joint: "Joint",
    activations: "With activations",
    other: "Other",
  };
  const bytes = (n) =>
    n < 1000
      ? `${n} B`
      : n < 1e6
        ? `${(n / 1e3).toFixed(1)} kB`
        : n < 1e9
          ? `${(n / 1e6).toFixed(n < 1e7 ? 2 : 1)} MB`
          : `${(n / 1e9).toFixed(2)} GB`;
  const ms = (n) => `${n >= 100 ? n.toFixed(0) : n >= 10 ? n.toFixed(1) : n.toFixed(3)} ms`;
  const metricText = (name, value) => {
    if (value === null || value === undefined) return "";
    if (value === "inf") return name === "snr_db" ? "exact" : "infinite";
    if (value === "-inf" || value === "nan") return "not a number";
    if (name === "snr_db") return `${value.toFixed(1)} dB`;
    if (name === "top1") return `${(100 * value).toFixed(1)} %`;
    return value === 0
      ? "0"
      : Math.abs(value) < 1e-3
        ? value.toExponential(1)
        : value.toPrecision(4);
  };

  // ---- tooltip -------------------------------------------------------------------------------
  const tip = $("#tip");
  const showTip = (event, title, pairs) => {
    tip.replaceChildren(
      h("strong", {}, title),
      h(
        "dl",
        {},
        pairs
          .filter(([, v]) => v !== "" && v !== null && v !== undefined)
          .flatMap(([k, v]) => [h("dt", {}, k), h("dd", {}, String(v))]),
      ),
    );
    tip.hidden = false;
    const at =
      event.clientX === undefined || event.type === "focus"
        ? event.target.getBoundingClientRect()
        : { left: event.clientX, top: event.clientY, width: 0 };
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(innerWidth - box.width - 8, at.left + 14))}px`;
    tip.style.top = `${at.top + 18 + box.height > innerHeight ? Math.max(8, at.top - box.height - 12) : at.top + 18}px`;
  };
  const hideTip = () => {
    tip.hidden = true;
  };

  // ---- what is shown -------------------------------------------------------------------------
  const state = {
    metric: data.metrics[0] ? data.metrics[0].name : null,
    hidden: new Set(),
    query: "",
  };
  const matches = (text) => text.toLowerCase().includes(state.query);
  const isShown = (item) =>
    !state.hidden.has(item.family) && matches(`${item.name} ${item.treatment}`);

  // ---- scales --------------------------------------------------------------------------------
  const ticks = (low, high, wanted) => {
    const rough = (high - low) / wanted,
      power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].find((m) => m * power >= rough) * power;
    const found = [];
    const first = Math.ceil(low / step);
    // Counted, as adding a step to a large number may not change it.
    for (let i = 0; i < 40 && (first + i) * step <= high + step * 1e-9; i++)
      found.push((first + i) * step);
    return { found, step };
  };
  const tickText = (value, step) =>
    value.toFixed((String(+step.toPrecision(6)).split(".")[1] || "").length);
  const spread = (low, high, share) => {
    const room = (high - low || Math.abs(high) || 1) * share;
    return [low - room, high + room];
  };

  // ---- a chart of what costs against what is lost, with its Pareto front -----------------------
  const NARROW = 560,
    WIDE = 1120,
    H = 348,
    LEFT = 56,
    RIGHT = 22,
    TOP = 18,
    BOTTOM = 46;
  const pareto = (points, moreIsBetter) => {
    const worth = (p) => (p.exact ? Infinity : moreIsBetter ? p.y : -p.y);
    const sorted = [...points].sort((a, b) => a.x - b.x || worth(b) - worth(a));
    let best = -Infinity;
    return sorted.filter((p) => worth(p) > best && ((best = worth(p)), true));
  };
  const chart = (points, options) => {
    const W = options.wide ? WIDE : NARROW;
    const metric = data.metrics.find((m) => m.name === state.metric);
    const drawn = points.filter(
      (p) =>
        isShown(p.item) &&
        p.value !== null &&
        p.value !== undefined &&
        p.value !== "nan" &&
        p.value !== "-inf" &&
        (metric.more || p.value !== "inf"),
    );
    if (!drawn.length)
      return h(
        "p",
        { class: "empty" },
        points.length ? "Nothing here matches the filter and has this metric." : "No data.",
      );
    const finite = drawn.filter((p) => p.value !== "inf");
    let [yLow, yHigh] = finite.length
      ? spread(
          Math.min(...finite.map((p) => p.value)),
          Math.max(...finite.map((p) => p.value)),
          0.12,
        )
      : [0, 1];
    if (metric.name === "top1") yHigh = Math.min(yHigh, 1.0 + 0.04 * (1 - yLow));
    if (!metric.more && yLow < 0) yLow = 0;
    const hasExact = drawn.some((p) => p.value === "inf");
    const xs = drawn.flatMap((p) => [p.x, ...(p.interval || [])]);
    let [xLow, xHigh] = spread(Math.min(...xs), Math.max(...xs), 0.1);
    xLow = Math.min(...xs) < 0.45 * Math.max(...xs) ? 0 : Math.max(0, xLow);
    const top = TOP + (hasExact ? 24 : 0);
    const X = (v) => LEFT + ((v - xLow) / (xHigh - xLow)) * (W - LEFT - RIGHT);
    // Up is better, also where less is.
    const height = (v) => (metric.more ? v - yLow : yHigh - v) / (yHigh - yLow);
    const Y = (v) => H - BOTTOM - height(v) * (H - BOTTOM - top);
    for (const p of drawn) {
      p.exact = p.value === "inf";
      p.y = p.exact ? yHigh : p.value;
      p.cx = X(p.x);
      p.cy = p.exact ? TOP + 4 : Y(p.value);
    }
    const svg = s("svg", {
      class: "chart",
      viewBox: `0 0 ${W} ${H}`,
      role: "group",
      "aria-label": options.label,
    });
    const yt = finite.length ? ticks(yLow, yHigh, 5) : { found: [], step: 1 };
    for (const t of yt.found) {
      const text =
        metric.name === "top1" ? `${tickText(100 * t, 100 * yt.step)} %` : tickText(t, yt.step);
      svg.append(line("grid", LEFT, W - RIGHT, Y(t), Y(t)), words(LEFT - 9, Y(t) + 4, "end", text));
    }
    if (hasExact)
      svg.append(
        line("grid", LEFT, W - RIGHT, TOP + 4, TOP + 4),
        words(LEFT - 9, TOP + 8, "end", "exact"),
      );
    const scale = options.scale(xHigh),
      xt = ticks(xLow / scale.by, xHigh / scale.by, options.wide ? 10 : 6);
    for (const t of xt.found) {
      const x = X(t * scale.by);
      svg.append(
        line("axis", x, x, H - BOTTOM, H - BOTTOM + 5),
        words(x, H - BOTTOM + 19, "middle", tickText(t, xt.step)),
      );
    }
    const turned = `translate(13 ${(top + H - BOTTOM) / 2}) rotate(-90)`;
    svg.append(
      line("axis", LEFT, W - RIGHT, H - BOTTOM, H - BOTTOM),
      words((LEFT + W - RIGHT) / 2, H - 8, "middle", `${options.axis}, ${scale.unit}`),
      words(null, null, "middle", metric.short, { transform: turned }),
    );
    if (options.stamp) {
      const stamp = { class: "stamp", "aria-hidden": "true" };
      svg.append(words(W / 2, H / 2 + 20, "middle", options.stamp, stamp));
    }
    const front = pareto(drawn, metric.more);
    if (front.length > 1) {
      const path = front
        .map((p, i) =>
          i ? `H${p.cx.toFixed(1)}V${p.cy.toFixed(1)}` : `M${p.cx.toFixed(1)} ${p.cy.toFixed(1)}`,
        )
        .join("");
      svg.append(s("path", { class: "front", d: path }));
    }
    const dots = [];
    for (const p of [...drawn].reverse()) {
      if (p.interval)
        svg.append(
          line(`whisker ${p.item.family}`, X(p.interval[0]), X(p.interval[1]), p.cy, p.cy),
        );
      const show = (event) =>
        showTip(event, p.item.name, [
          ["treatment", p.item.treatment],
          [metric.short, metricText(metric.name, p.value)],
          ...options.pairs(p),
        ]);
      const dot = s("circle", {
        class: `dot ${p.item.family}`,
        cx: p.cx.toFixed(2),
        cy: p.cy.toFixed(2),
        r: front.includes(p) ? 6 : 4.5,
        tabindex: 0,
        role: "img",
        "aria-label": `${p.item.name}: ${options.say(p)}, ${metricText(metric.name, p.value)}`,
        on: { mousemove: show, focus: show, mouseleave: hideTip, blur: hideTip },
      });
      dots.push(dot);
      svg.append(dot);
    }
    svg.append(...labels(drawn, front, W));
    return svg;
  };
  // Names of points, those of the front first, each where it hides neither a point nor a name.
  const labels = (points, front, W) => {
    const boxes = points.map((p) => [p.cx - 6, p.cy - 6, p.cx + 6, p.cy + 6]),
      found = [];
    const others = points.filter((p) => !front.includes(p));
    for (const p of [...front, ...others]) {
      const text = p.item.name.length > 24 ? `${p.item.name.slice(0, 23)}\u2026` : p.item.name,
        width = text.length * 6.1,
        own = boxes[points.indexOf(p)];
      const places = [
        [p.cx + 9, p.cy + 4, "start"],
        [p.cx - 9, p.cy + 4, "end"],
        [p.cx, p.cy - 11, "middle"],
        [p.cx, p.cy + 19, "middle"],
        [p.cx + 7, p.cy - 9, "start"],
        [p.cx + 7, p.cy + 17, "start"],
      ];
      for (const [x, y, anchor] of places) {
        const left = anchor === "start" ? x : anchor === "end" ? x - width : x - width / 2,
          box = [left - 2, y - 11, left + width + 2, y + 3];
        if (box[0] < LEFT || box[2] > W - 2 || box[1] < 0 || box[3] > H - BOTTOM) continue;
        const hides = (b) =>
          b !== own && b[0] < box[2] && b[2] > box[0] && b[1] < box[3] && b[3] > box[1];
        if (boxes.some(hides)) continue;
        boxes.push(box);
        const name = { class: "name", "aria-hidden": "true" };
        found.push(words(x.toFixed(1), y.toFixed(1), anchor, text, name));
        break;
      }
    }
    return found;
  };

  const sizeScale = (high) =>
    high >= 2e9
      ? { by: 1e9, unit: "GB" }
      : high >= 1e6
        ? { by: 1e6, unit: "MB" }
        : { by: 1e3, unit: "kB" };
  const drawCharts = () => {
    const size = $("#size-chart");
    if (size) {
      const points = data.packages
        .filter((p) => p.bytes !== null)
        .map((item) => ({ item, x: item.bytes, value: item.metrics[state.metric] }));
      size.replaceChildren(
        chart(points, {
          wide: size.parentElement.classList.contains("wide"),
          label: "Size against accuracy",
          axis: "Size of the package",
          scale: sizeScale,
          pairs: (p) => [
            ["size", bytes(p.x)],
            ["smaller by", p.item.ratio ? `${p.item.ratio.toFixed(2)}x` : ""],
            ["bits per weight", p.item.bits ? p.item.bits.toFixed(2) : ""],
            ["accuracy from", p.item.metricsSource],
          ],
          say: (p) => bytes(p.x),
        }),
      );
    }
    for (const group of data.groups) {
      const place = $(`#${group.id}`);
      if (!place) continue; // without an accuracy to draw against, latencies stand in tables alone
      const points = group.runs.map((run) => ({
        item: data.packages[run.package],
        x: run.median,
        interval: run.ci95,
        value: data.packages[run.package].metrics[state.metric],
        run,
      }));
      place.replaceChildren(
        chart(points, {
          label: `Latency against accuracy, ${group.title}`,
          axis: group.axis,
          scale: () => ({ by: 1, unit: "ms" }),
          stamp: group.stamp,
          pairs: (p) => [
            ["run", p.run.run],
            ["median", ms(p.x)],
            ["95 % interval", `${ms(p.run.ci95[0])} to ${ms(p.run.ci95[1])}`],
            ["p90 / p99", `${ms(p.run.p90)} / ${ms(p.run.p99)}`],
            ["predictions", p.run.n],
            ["size", bytes(p.item.bytes)],
            ["these are", group.kindText],
          ],
          say: (p) => ms(p.x),
        }),
      );
    }
  };

  // ---- tables: sorting, and the filter ---------------------------------------------------------
  // What has no value stands last, whichever way.
  const order = (a, b, sign) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    const numbers = !isNaN(a) && !isNaN(b);
    return sign * (numbers ? a - b : a.localeCompare(b, undefined, { numeric: true }));
  };
  const sortable = (table) => {
    const body = $("tbody", table);
    $$("thead th", table).forEach((cell, column) => {
      const sort = () => {
        const down = cell.getAttribute("aria-sort") === "ascending";
        $$("th", table).forEach((other) => other.removeAttribute("aria-sort"));
        cell.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
        const rows = $$("tr", body).map((row) => [row, key(row)]);
        rows.sort(([, a], [, b]) => order(a, b, down ? -1 : 1));
        body.append(...rows.map(([row]) => row));
      };
      cell.replaceChildren(button({}, sort, cell.textContent));
    });
  };
  const filterTable = () => {
    const table = $("#packages-table");
    if (!table) return;
    let n = 0;
    for (const row of $$("tbody tr", table)) {
      const { family, search } = row.dataset;
      row.hidden = !isShown({ family, name: search, treatment: "" });
      n += !row.hidden;
    }
    $("#shown").textContent = `${n} of ${$$("tbody tr", table).length} shown`;
  };

  // ---- layers ----------------------------------------------------------------------------------
  const layers = $("#layers");
  const layerState = { report: 0, by: "graph", query: "", all: false };
  const MOST = 60;
  const snrOf = (w) => (w.snr === "inf" ? Infinity : typeof w.snr === "number" ? w.snr : -Infinity);
  const MEASURES = {
    bits: { what: "bits per weight", measure: (w) => w.bits, sign: -1 },
    snr: { what: "SNR", measure: snrOf, sign: 1 },
    bytes: { what: "stored bytes", measure: (w) => w.after, sign: -1 },
  };
  const drawLayers = () => {
    if (!layers) return;
    const report = data.compressions[layerState.report];
    const { what, measure, sign } = MEASURES[layerState.by] ?? MEASURES.bits;
    const shown = report.weights.filter((w) =>
      `${w.name} ${w.treatment} ${w.ops}`.toLowerCase().includes(layerState.query),
    );
    if (layerState.by !== "graph") shown.sort((a, b) => sign * (measure(a) - measure(b)));
    const most = Math.max(1e-9, ...report.weights.map(measure).filter(Number.isFinite));
    const rows = (layerState.all ? shown : shown.slice(0, MOST)).map((w) => {
      const bar = h("i", {});
      bar.style.width = `${100 * Math.max(0, Math.min(1, measure(w) / most))}%`;
      const detail = [w.treatment || "left", w.shape, w.ops].filter(Boolean).join(" \u00b7 ");
      const snr = w.snr === null ? "\u2013" : w.snr === "inf" ? "exact" : (+w.snr).toFixed(1);
      return h(
        "div",
        { class: `layer ${w.status === "compressed" ? "" : "left"}`, "data-name": w.name },
        h(
          "div",
          { class: "who" },
          w.name,
          h("small", {}, detail),
          w.note ? h("small", {}, w.note) : null,
        ),
        h("div", { class: `bar ${report.family}` }, bar),
        ...[w.bits.toFixed(2), snr, bytes(w.after)].map((text) => h("div", { class: "n" }, text)),
      );
    });
    const head = h(
      "div",
      { class: "layer head" },
      h("div", {}, `Weight (${shown.length})`),
      h("div", { class: "what" }, what),
      ...["bits", "SNR dB", "stored"].map((text) => h("div", { class: "n" }, text)),
    );
    const showAll = () => {
      layerState.all = true;
      drawLayers();
    };
    layers.replaceChildren(head, ...rows);
    if (!rows.length) layers.append(h("p", { class: "empty" }, "No weight matches."));
    if (shown.length > rows.length)
      layers.append(h("div", { class: "more" }, button({}, showAll, `Show all ${shown.length}`)));
  };

  // ---- controls --------------------------------------------------------------------------------
  const press = (buttons, chosen) =>
    buttons.forEach((b) => b.setAttribute("aria-pressed", String(b === chosen)));
  const choice = (selector, act) => {
    const buttons = $$(selector);
    buttons.forEach((button) =>
      button.addEventListener("click", () => {
        press(buttons, button);
        act(button.dataset.value);
      }),
    );
  };
  const redraw = () => {
    drawCharts();
    filterTable();
  };
  choice("[data-choice=metric] button", (value) => {
    state.metric = value;
    redraw();
  });
  choice("[data-choice=layers] button", (value) => {
    layerState.by = value;
    drawLayers();
  });
  const legend = $("#legend");
  if (legend) {
    const inUse = new Set(data.packages.map((p) => p.family));
    for (const family of Object.keys(FAMILIES).filter((name) => inUse.has(name))) {
      const toggle = (event) => {
        const on = state.hidden.delete(family);
        if (!on) state.hidden.add(family);
        event.currentTarget.setAttribute("aria-pressed", String(on));
        redraw();
      };
      const attributes = { "aria-pressed": "true", "data-family": family };
      legend.append(button(attributes, toggle, h("i", { class: family }), FAMILIES[family]));
    }
  }
  const onInput = (selector, act) => {
    const input = $(selector);
    if (input) input.addEventListener("input", () => act(input.value.trim().toLowerCase()));
  };
  onInput("#filter", (text) => {
    state.query = text;
    redraw();
  });
  onInput("#layer-search", (text) => {
    layerState.query = text;
    drawLayers();
  });
  onInput("#op-search", (text) =>
    $$(".placement tbody tr").forEach((row) => {
      row.hidden = !row.textContent.toLowerCase().includes(text);
    }),
  );
  const select = $("#layer-report");
  if (select)
    select.addEventListener("change", () => {
      layerState.report = +select.value;
      layerState.all = false;
      drawLayers();
    });

  for (const part of $$("[data-share]")) part.style.flexGrow = part.dataset.share;
  $$("table.sortable").forEach(sortable);

  const theme = $("#theme"),
    root = document.documentElement,
    dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const paint = () => {
    const now = chosen ?? (dark.matches ? "dark" : "light");
    root.dataset.theme = now;
    theme.textContent = now === "dark" ? "Light" : "Dark";
  };
  theme.addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    paint();
  });
  dark.addEventListener("change", paint);
  // On paper always black on white, and everything that is folded is unfolded.
  const before = { theme: null, closed: [] };
  addEventListener("beforeprint", () => {
    before.theme = chosen;
    before.closed = $$("details:not([open])");
    before.closed.forEach((each) => {
      each.open = true;
    });
    layerState.all = true;
    drawLayers();
    chosen = "light";
    paint();
  });
  addEventListener("afterprint", () => {
    before.closed.forEach((each) => {
      each.open = false;
    });
    chosen = before.theme;
    paint();
  });
  paint();
  redraw();
  drawLayers();
})();
