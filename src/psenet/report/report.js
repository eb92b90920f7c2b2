"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const charts = [...document.querySelectorAll(".chart")];
  const settings = { displayModeBar: false, responsive: true };
  const drawn = charts.map((chart) => {
    const spec = read(chart.id + "-spec");
    return Plotly.newPlot(chart, spec.data, spec.layout, settings);
  });

  function connect(box) {
    const spec = read(box.dataset.spec);
    const chart = document.getElementById(spec.chart);
    const input = box.querySelector("input");
    const output = box.querySelector("output");
    const facts = [...box.querySelectorAll("dd")];
    const rows = [...box.querySelectorAll("tbody tr")];
    // Choices get better as they get dearer: the last one inside the budget is the best.
    const best = (budget) => spec.choices.filter((one) => one.share <= budget + 1e-9).pop() || spec.choices[0];

    function pick() {
      const budget = Number(input.value);
      const choice = best(budget);
      output.textContent = budget.toFixed(1) + " %";
      input.setAttribute("aria-valuetext", output.textContent);
      facts.forEach((fact, number) => { fact.textContent = choice.facts[number]; });
      rows.forEach((row, number) => {
        const share = spec.full[number] ? choice.widths[number] / spec.full[number] : 0;
        row.querySelector(".width").textContent = choice.widths[number] + " / " + spec.full[number];
        row.querySelector("b").style.width = (100 * share).toFixed(1) + "%";
        row.querySelector(".bar span").textContent = (100 * share).toFixed(0) + " %";
      });
      const line = {
        type: "line", x0: budget, x1: budget, y0: 0, y1: 1, yref: "paper", line: { color: "#b4532a", width: 1, dash: "dot" },
      };
      Plotly.update(chart, { x: [[choice.share]], y: [[choice.score]] }, { shapes: [line] }, [spec.trace]);
    }
    input.addEventListener("input", pick);
    pick();
  }

  Promise.all(drawn).then(() => {
    document.querySelectorAll(".slider").forEach(connect);
    document.documentElement.dataset.ready = "true";
  });

  // Paper has another width than the screen, and nobody can unfold what is printed.
  const folded = () => [...document.querySelectorAll("details")];
  addEventListener("beforeprint", () => {
    folded().forEach((one) => { one.dataset.open = one.open; one.open = true; });
    charts.forEach((chart) => Plotly.relayout(chart, { autosize: false, width: 660 }));
  });
  addEventListener("afterprint", () => {
    folded().forEach((one) => { one.open = one.dataset.open === "true"; });
    charts.forEach((chart) => Plotly.relayout(chart, { autosize: true, width: null }));
  });
})();
