"use strict";
(function () {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const printing = window.matchMedia("print");
  function colours() {
    const isDark = dark.matches && !printing.matches;
    const grid = isDark ? "#333a45" : "#dfe3ea";
    return { text: isDark ? "#e6e9ef" : "#1d2430", grid: grid };
  }
  function layout(figure) {
    const c = colours();
    const full = JSON.parse(JSON.stringify(figure.layout));
    full.paper_bgcolor = full.plot_bgcolor = "rgba(0,0,0,0)";
    full.font = { color: c.text, family: "system-ui, sans-serif", size: 12 };
    for (const axis of ["xaxis", "yaxis"]) {
      full[axis] = Object.assign({ gridcolor: c.grid, zerolinecolor: c.grid }, full[axis] || {});
    }
    full.hoverlabel = { align: "left" };
    return full;
  }
  function draw() {
    for (const id of Object.keys(figures)) {
      const place = document.getElementById("chart-" + id);
      Plotly.react(place, figures[id].data, layout(figures[id]), { responsive: true, displayModeBar: false });
    }
    document.documentElement.dataset.drawn = "yes";
  }
  draw();
  dark.addEventListener("change", draw);
  printing.addEventListener("change", draw);
})();
