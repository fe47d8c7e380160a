"use strict";
(function () {
  const every = 3000;
  const chosen = new URLSearchParams(location.search).get("campaign");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const place = (id) => document.getElementById(id);
  function number(value) {
    return typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(6))) : value ?? "";
  }
  function gain(value, relative) {
    if (value === null || value === undefined) return "";
    return relative ? (100 * value).toFixed(2) + "%" : number(value);
  }
  function element(tag, words, kind) {
    const made = document.createElement(tag);
    made.textContent = words;
    if (kind) made.className = kind;
    return made;
  }
  function table(target, names, rows) {
    const head = document.createElement("tr");
    head.append(...names.map((name) => element("th", name)));
    target.replaceChildren(head, ...rows);
  }
  function row(cells) {
    const made = document.createElement("tr");
    made.append(...cells);
    return made;
  }
  function facts(c) {
    const shown = [
      [c.turn === null ? "0" : c.turn + (c.budget ? " of " + c.budget : ""), "turns"], [c.kept, "kept"],
      [number(c.best_metric) || "-", "best " + c.metric_name], [gain(c.best_gain, c.relative) || "-", "its gain"],
      [c.champion || "-", "champion"], [(c.trial_s / 3600).toFixed(2), "hours in trials"],
    ];
    place("facts").replaceChildren(...shown.map(([value, words]) => {
      const box = document.createElement("div");
      box.append(element("b", value), element("span", words));
      return box;
    }));
  }
  function now(current, c) {
    if (!current.length) return c.status === "finished" ? "Finished: " + (c.stop_reason || "") : "Between turns (" + c.status + ").";
    const t = current[0];
    const what = t.knob ? t.knob + " = " + t.new_value : "waiting for a proposal";
    return "Turn " + t.iteration + ", " + t.proposer + " (" + t.role + "): " + what + "; stage " + t.stage + ", " + t.trials + " trials run.";
  }
  function draw(points) {
    const trace = (outcome, colour, size) => {
      const some = points.filter((p) => (p.outcome === "kept") === (outcome === "kept"));
      return { type: "scatter", mode: "markers", name: outcome, x: some.map((p) => p.iteration), y: some.map((p) => p.metric),
        marker: { color: colour, size: size } };
    };
    const sorted = points.map((p) => p.metric).sort((a, b) => a - b), cut = sorted.length > 10 ? Math.ceil(sorted.length / 40) : 0;
    const bulk = sorted.slice(cut, sorted.length - cut).concat(points.filter((p) => p.outcome === "kept").map((p) => p.metric));
    const low = Math.min(...bulk), high = Math.max(...bulk), room = 0.12 * (high - low) || 0.01 * Math.abs(high) || 1;
    const range = points.length ? [low - room, high + room] : [0, 1];  // one diverged run would flatten the rest
    const ink = dark.matches ? "#e6e9ef" : "#1d2430", grid = dark.matches ? "#333a45" : "#dfe3ea";
    Plotly.react(place("chart"), [trace("reverted", "#8a94a6", 6), trace("kept", "#2a9d5c", 10)], {
      height: 320, margin: { l: 60, r: 16, t: 8, b: 40 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: ink }, xaxis: { title: { text: "turn" }, gridcolor: grid }, yaxis: { gridcolor: grid, range: range },
      legend: { orientation: "h" } }, { responsive: true, displayModeBar: false });
  }
  async function ask() {
    try {
      const answer = await fetch("/-/live/data" + (chosen ? "?campaign=" + encodeURIComponent(chosen) : ""));
      if (!answer.ok) throw new Error(answer.status);
      show(await answer.json());
      place("seen").textContent = "seen " + new Date().toLocaleTimeString();
    } catch (error) {
      place("seen").textContent = "no answer (" + error.message + "); asking again";
    }
    setTimeout(ask, every);
  }
  function show(data) {
    const one = data.campaign, c = data.campaigns.find((each) => each.name === one.name);
    place("closer").href = one.sql;
    if (!c) { place("title").textContent = one.name ? "no campaign " + one.name : "No campaign yet"; return; }
    place("title").textContent = c.name + ": " + c.status;
    facts(c);
    place("now").textContent = now(one.current, c);
    draw(one.points);
    table(place("turns"), ["turn", "proposer", "change", "outcome", "metric", "gain", "runs", "reason given"], one.turns.map((t) => row([
      element("td", t.iteration, "n"), element("td", t.proposer), element("td", t.knob ? t.knob + " = " + t.new_value : ""),
      element("td", t.outcome + (t.failure || t.rail ? ": " + (t.failure || t.rail) : ""), t.outcome), element("td", number(t.metric), "n"),
      element("td", gain(t.gain, c.relative), "n"), element("td", t.trials, "n"), element("td", t.reason || "", "words")])));
    table(place("campaigns"), ["campaign", "status", "turn", "kept", "best gain"], data.campaigns.map((each) => {
      const link = element("a", each.name);
      link.href = "?campaign=" + encodeURIComponent(each.name);
      const first = document.createElement("td");
      first.append(link);
      return row([first, element("td", each.status), element("td", each.turn ?? 0, "n"), element("td", each.kept, "n"),
        element("td", gain(each.best_gain, each.relative), "n")]);
    }));
    document.documentElement.dataset.shown = c.name;
  }
  ask();
})();
