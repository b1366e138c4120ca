// Draws the charts and the tree explorer of a report. All text of a run reaches the page as `textContent` or as an
// escaped plotly label: it is never parsed as markup. Nothing here makes a request.
"use strict";
(() => {
  const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
  const UNKNOWN = [150, 158, 170];
  const MAX_DEPTH_SHOWN = 14;
  const byId = (id) => document.getElementById(id);

  const cssColour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function withColours(value) {
    if (typeof value === "string") {
      const found = /^var\((--[a-z-]+)\)$/.exec(value);
      return found ? cssColour(found[1]) : value;
    }
    if (Array.isArray(value)) return value.map(withColours);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, withColours(inner)]));
  }

  async function unpack(id) {
    const bytes = Uint8Array.from(atob(byId(id).textContent.trim()), (char) => char.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  }

  const plotlyEscape = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

  function element(tag, text, className) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  function figureText(value, digits = 4) {
    if (value === null || value === undefined) return "–";
    return Number.isInteger(value) ? value.toLocaleString("en-US") : String(Number(value.toPrecision(digits)));
  }

  const CONFIG = { displayModeBar: false, responsive: true };

  function baseLayout() {
    const title = { font: { size: 12, color: cssColour("--muted") }, standoff: 10 };
    const axis = {
      gridcolor: cssColour("--grid"), linecolor: cssColour("--line"), zeroline: false, automargin: true, title,
      tickfont: { size: 12 },
    };
    return {
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: cssColour("--text") },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 48, r: 12, t: 8, b: 40 },
      xaxis: axis, yaxis: axis,
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 12 } },
      hoverlabel: { font: { family: getComputedStyle(document.body).fontFamily, size: 13 }, align: "left" },
    };
  }

  function drawFigure(target, figure) {
    const layout = baseLayout();
    for (const [key, value] of Object.entries(withColours(figure.layout))) {
      layout[key] = typeof value === "object" ? { ...layout[key], ...value } : value;
      if (value.title) layout[key].title = { ...baseLayout()[key].title, ...value.title };
    }
    layout.showlegend = figure.data.length > 1;
    if (layout.showlegend) layout.margin = { ...layout.margin, t: 34 };
    return Plotly.react(target, withColours(figure.data), layout, CONFIG);
  }

  function valueColour(value, low, high) {
    if (value === null) return UNKNOWN;
    const at = high > low ? ((value - low) / (high - low)) * (VIRIDIS.length - 1) : (VIRIDIS.length - 1) / 2;
    const index = Math.min(VIRIDIS.length - 2, Math.max(0, Math.floor(at)));
    const mix = VIRIDIS[index].map((from, i) => Math.round(from + (VIRIDIS[index + 1][i] - from) * (at - index)));
    return mix;
  }

  const rgb = (colour) => `rgb(${colour.join(",")})`;

  // Black or white, by the weights of the eye for red, green and blue (ITU-R BT.601).
  const readableOn = ([red, green, blue]) => (0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#111" : "#fff");

  // The children of a node share its width by their visits; what is left is the node's own evaluation. Widths are
  // given as each node's own part, so that a tree whose counts do not add up is drawn too, instead of not at all.
  function ownParts(tree) {
    const own = tree.visits.slice();
    tree.parent.forEach((parent, node) => { if (parent >= 0) own[parent] -= tree.visits[node]; });
    return own.map((part) => Math.max(0, part));
  }

  function hoverText(tree, node) {
    const parts = [
      node === 0 ? "<b>root</b>" : `<b>${plotlyEscape(tree.action[node])}</b>`,
      `visits ${figureText(tree.visits[node])}`,
      `value ${figureText(tree.value[node])}`,
    ];
    if (tree.prior[node] !== null) parts.push(`prior ${figureText(tree.prior[node], 3)}`);
    if (tree.reward[node] !== null) parts.push(`reward ${figureText(tree.reward[node])}`);
    if (tree.mark[node]) parts.push(plotlyEscape(tree.mark[node]));
    parts.push(`node ${tree.node_id[node]}`);
    return parts.join("<br>");
  }

  function drawTree(move) {
    const target = byId("tree");
    const tree = move.tree;
    byId("legend").replaceChildren();
    target.hidden = !tree;
    byId("no-tree").hidden = Boolean(tree);
    if (!tree) {
      byId("no-tree").textContent = move.action === null ? "The final observation: no move was searched here."
        : move.visits ? "The tree of this move is not on this page." : "This move was played without a search.";
      return Promise.resolve();
    }
    const known = tree.value.filter((value) => value !== null);
    const low = known.reduce((a, b) => Math.min(a, b), Infinity);
    const high = known.reduce((a, b) => Math.max(a, b), -Infinity);
    const played = move.node === null ? -1 : tree.node_id.indexOf(move.node);
    const colours = tree.value.map((value) => valueColour(value, low, high));
    const isPlayed = (node) => node === played && node > 0;
    const trace = {
      type: "icicle",
      ids: tree.node_id.map(String),
      parents: tree.parent.map((parent) => (parent < 0 ? "" : String(tree.node_id[parent]))),
      labels: tree.action.map((action, node) => (node === 0 ? "root" : plotlyEscape(action))),
      values: ownParts(tree),
      branchvalues: "remainder",
      marker: {
        colors: colours.map(rgb),
        line: {
          color: tree.node_id.map((_, node) => cssColour(isPlayed(node) ? "--played" : "--card")),
          width: tree.node_id.map((_, node) => (isPlayed(node) ? 4 : 1)),
        },
      },
      hovertext: tree.node_id.map((_, node) => hoverText(tree, node)),
      hovertemplate: "%{hovertext}<extra></extra>",
      textinfo: "label",
      leaf: { opacity: 1 },
      textfont: { color: colours.map(readableOn) },
      tiling: { orientation: "v", pad: 0 },
      pathbar: { visible: true, side: "top" },
      maxdepth: MAX_DEPTH_SHOWN,
    };
    showLegend(tree, known.length ? [low, high] : null, played > 0);
    const layout = { ...baseLayout(), margin: { l: 0, r: 0, t: 26, b: 0 } };
    return Plotly.react(target, [trace], layout, CONFIG);
  }

  function showLegend(tree, range, hasPlayed) {
    const legend = byId("legend");
    const shown = tree.node_id.length;
    const count = shown === tree.num_nodes ? `${figureText(shown)} nodes`
      : `the ${figureText(shown)} most visited of ${figureText(tree.num_nodes)} nodes`;
    legend.append(element("span", `${count}; width: visits; click to zoom`));
    const numFailed = tree.mark.filter((mark) => mark.startsWith("failed")).length;
    if (numFailed) legend.append(element("span", `${figureText(numFailed)} failed branches, without width`));
    if (range) {
      const item = element("span", `value ${figureText(range[0], 3)}`);
      const ramp = element("span", "", "ramp");
      const stops = range[0] === range[1] ? [VIRIDIS[2], VIRIDIS[2]] : VIRIDIS;
      ramp.style.background = `linear-gradient(90deg, ${stops.map(rgb).join(",")})`;
      item.append(ramp, document.createTextNode(figureText(range[1], 3)));
      legend.append(item);
    }
    const swatches = [];
    if (tree.value.some((value) => value === null)) swatches.push([rgb(UNKNOWN), "no value"]);
    if (hasPlayed) swatches.push([cssColour("--played"), "played"]);
    for (const [colour, text] of swatches) {
      const item = element("span");
      const swatch = element("span", "", "swatch");
      swatch.style.background = colour;
      item.append(swatch, document.createTextNode(text));
      legend.append(item);
    }
  }

  function showFacts(move) {
    const facts = [];
    if (move.action !== null) facts.push(["action", move.action]);
    if (move.reward !== null) facts.push(["reward", figureText(move.reward)]);
    if (move.visits !== null) facts.push(["visits of the root", figureText(move.visits)]);
    if (move.value !== null) facts.push(["value of the root", figureText(move.value)]);
    if (move.seconds !== null) facts.push(["time", `${figureText(move.seconds, 3)} s`]);
    if (move.ending) facts.push(["then", move.ending]);
    const rows = facts.map(([name, text]) => {
      const row = element("tr");
      row.append(element("td", name), element("td", text));
      return row;
    });
    byId("facts").replaceChildren(...rows);
  }

  function showChoices(move) {
    const most = move.choices.reduce((a, choice) => Math.max(a, choice[1]), 1);
    const rows = move.choices.map(([action, visits, target], index) => {
      const row = element("tr", undefined, index === move.played ? "played" : "");
      const bar = element("span", "", "bar");
      bar.style.width = `${(100 * visits) / most}%`;
      const cell = element("td", undefined, "bar-cell");
      cell.append(bar);
      row.append(element("td", action), cell, element("td", figureText(visits), "number"));
      if (target !== null) row.append(element("td", figureText(target, 3), "number"));
      return row;
    });
    byId("choices").replaceChildren(...rows);
    byId("choices-part").hidden = rows.length === 0;
  }

  function makeExplorer(episodes) {
    const picker = byId("episode");
    const slider = byId("step");
    let episode = null;

    episodes.forEach((entry, index) => {
      const result = entry.failure ? "failed" : `return ${figureText(entry.return)}`;
      const option = element("option", `${entry.number}: ${result}, ${entry.length} steps, task ${entry.task}`);
      option.value = String(index);
      picker.append(option);
    });

    function showMove(at) {
      const last = episode.moves.length - 1;
      const index = Math.min(last, Math.max(0, at));
      const move = episode.moves[index];
      slider.max = String(Math.max(0, last));
      slider.value = String(index);
      byId("previous").disabled = index === 0;
      byId("next").disabled = index >= last;
      byId("position").textContent = move ? `step ${move.t} of ${episode.length}` : "no steps were recorded";
      byId("move").hidden = !move;
      if (!move) return Promise.resolve();
      byId("observation").textContent = move.observation;
      byId("info").textContent = move.info;
      byId("info-part").hidden = ["", "{}", "null"].includes(move.info);
      showFacts(move);
      showChoices(move);
      return drawTree(move);
    }

    function showEpisode(index) {
      picker.value = String(index);
      episode = episodes[index];
      const failure = byId("failure");
      failure.hidden = !episode.failure;
      failure.textContent = episode.failure ? `This episode failed: ${episode.failure}` : "";
      return showMove(0);
    }

    picker.addEventListener("change", () => showEpisode(Number(picker.value)));
    slider.addEventListener("input", () => showMove(Number(slider.value)));
    byId("previous").addEventListener("click", () => showMove(Number(slider.value) - 1));
    byId("next").addEventListener("click", () => showMove(Number(slider.value) + 1));
    for (const button of document.querySelectorAll("button[data-episode]")) {
      button.addEventListener("click", () => {
        const index = episodes.findIndex((entry) => String(entry.number) === button.dataset.episode);
        showEpisode(index);
        byId("explorer").scrollIntoView({ behavior: "smooth" });
      });
    }
    return { showEpisode, redraw: () => showMove(Number(slider.value)) };
  }

  async function draw() {
    if (typeof DecompressionStream === "undefined") {
      throw new Error("this browser is too old to unpack the page: use one from 2023 or later");
    }
    const script = document.createElement("script");
    script.textContent = await unpack("plotly-code");
    document.head.append(script);
    if (typeof Plotly === "undefined") throw new Error("the chart library did not load");
    const report = JSON.parse(await unpack("report-data"));
    const charts = () => Promise.all(Object.entries(report.figures).map(([id, figure]) => drawFigure(byId(id), figure)));
    await charts();
    const explorer = report.episodes.length ? makeExplorer(report.episodes) : null;
    if (explorer) await explorer.showEpisode(report.first);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      charts();
      if (explorer) explorer.redraw();
    });
    document.documentElement.dataset.drawn = "true";
  }

  draw().catch((error) => {
    const trouble = byId("trouble");
    trouble.textContent = `The charts could not be drawn: ${error.message}`;
    trouble.hidden = false;
    document.documentElement.dataset.drawn = "failed";
  });
})();
