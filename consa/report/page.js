// Shows the run that is picked, draws each chart when it is first shown, and fills in tables of numbers when opened.
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

const picker = document.getElementById("run");
function showPicked() {
  if (picker) {
    for (const part of document.querySelectorAll("[data-run]")) part.hidden = part.dataset.run !== picker.value;
    if (picker.list) {
      const { label } = picker.list.options[picker.value];
      picker.setAttribute("aria-valuetext", (document.getElementById("chosen").value = label));
    }
  }
  drawShown();
}
if (picker) {
  picker.closest("section").hidden = false;
  picker.addEventListener("input", showPicked);
}
showPicked();

for (const details of document.querySelectorAll("details[data-rows]")) {
  details.addEventListener("toggle", () => {
    const table = details.querySelector("table");
    if (table.rows.length) return;
    const columns = Object.entries(data[details.dataset.rows]).filter(([name]) => !/colour|shade| name$/.test(name));
    table.createTHead().insertRow().append(...columns.map(([name]) => cell("th", name.replaceAll("_", " "))));
    const body = table.createTBody();
    columns[0][1].forEach((_, row) => body.insertRow().append(...columns.map(([, values]) => cell("td", values[row] ?? "–"))));
  });
}

function cell(tag, text) {
  return Object.assign(document.createElement(tag), { textContent: text });
}
