// Draws each chart when it is first shown, and shows the run that the slider is at.
const { charts, data } = JSON.parse(document.getElementById("data").textContent);

function rowsOf(columns) {
  const names = Object.keys(columns);
  return columns[names[0]].map((_, row) => Object.fromEntries(names.map((name) => [name, columns[name][row]])));
}

async function drawShown() {
  for (const plot of document.querySelectorAll(".plot:not(.drawn)")) {
    if (plot.offsetParent === null) continue;
    plot.classList.add("drawn");
    const { spec, rows } = charts[plot.dataset.chart];
    await vegaEmbed(plot, { ...spec, background: null, data: { values: rowsOf(data[rows]) } }, { renderer: "svg", actions: false });
  }
}

const slider = document.getElementById("slider");
function showChosen() {
  if (slider) {
    for (const part of document.querySelectorAll("[data-run]")) part.hidden = part.dataset.run !== slider.value;
    document.getElementById("chosen").value = slider.dataset[`run${slider.value}`];
    slider.setAttribute("aria-valuetext", slider.dataset[`run${slider.value}`]);
  }
  drawShown();
}
if (slider) slider.addEventListener("input", showChosen);
showChosen();
