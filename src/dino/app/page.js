// What Gradio lacks: Enter in the number of a slider, and an event of what was drawn around, or clicked on, in a plot.
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.target.matches("input[type=number]")) event.target.blur();
});
new MutationObserver(() => {
  const plot = document.querySelector("#map .js-plotly-plot");
  if (!plot || !plot.on || plot.heard) return;
  plot.heard = true;
  if (plot.clientWidth < 600) {  // the whole legend below the map
    const update = { "legend.orientation": "h", "legend.maxheight": 2000, height: 2000 };
    Plotly.relayout(plot, update).then(() => {
      Plotly.relayout(plot, { height: 440 + plot.querySelector(".legend .bg").getBBox().height });
    });
  }
  const round = (number) => Math.round(number * 1000) / 1000;
  const outline = (shape) => {
    if (shape.type === "path") return shape.path.match(/-?\d+(\.\d+)?(e-?\d+)?/g).map(Number).map(round);
    const { x0, y0, x1, y1 } = shape;
    return [x0, y0, x0, y1, x1, y1, x1, y0].map(round);
  };
  let last = "";
  const send = (index) => {
    if (JSON.stringify(index) === last) return;  // Plotly reports a selection again when a class is hidden or shown
    last = JSON.stringify(index);
    trigger("select", { index });
  };
  plot.on("plotly_selected", (event) => {
    const shapes = (event && event.selections) || [];
    const hidden = plot.data.flatMap((trace, number) => (trace.visible === "legendonly" ? [number] : []));
    if (shapes.length) send({ shapes: shapes.map(outline), hidden });
  });
  plot.on("plotly_deselect", () => send({ shapes: [], hidden: [] }));
  plot.on("plotly_click", (event) => send({ row: event.points[0].customdata }));
}).observe(document.body, { childList: true, subtree: true });
