// Draws each .chart block of a report from the JSON in it: evodiff/tables/chart.py.
(() => {
"use strict";
const W = 960, H = 430, L = 62, R = 14, T = 12, B = 42;
const DASH = ["", "7 4", "2 3", "8 3 2 3", "15 4", "8 3 2 3 2 3", "15 3 5 3"];
function ticks(a, b, log, budgets) {
  if (!log) {
    const steps = [1, 2, 5, 10].map(m => m * 10 ** Math.floor(Math.log10((b - a) / 8)));
    const step = Math.max(steps.find(s => (b - a) / s <= 9), budgets ? 1 : 0);
    const from = Math.ceil(a / step - 1e-9);
    return Array.from({length: Math.max(0, Math.floor(b / step + 1e-9) - from + 1)}, (_, i) => (from + i) * step);
  }
  const out = [], fine = [1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9];
  const marks = budgets || b / a >= 40 ? [1, 2, 5] : b / a >= 4 ? [1, 1.5, 2, 3, 4, 5, 6, 8] : fine;
  for (let e = Math.floor(Math.log10(a)); e <= Math.ceil(Math.log10(b)); e++)
    for (const m of marks) { const v = m * 10 ** e; if (v >= a * 0.999 && v <= b * 1.001) out.push(v); }
  return out;
}
const text = v => Math.abs(v) >= 1000 ? v.toFixed(0) : String(+v.toPrecision(4));
const stroke = r => `stroke="${r.colour}" stroke-dasharray="${DASH[r.dash % DASH.length]}"`;
const escape = s => s.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/"/g, "&quot;");
document.querySelectorAll(".chart").forEach((box, k) => {
  const data = JSON.parse(box.querySelector("script").textContent);
  const off = new Set(data.rows.filter(r => r.off).map(r => r.name));
  const figure = box.querySelector("figure"), legend = box.querySelector(".legend");
  const on = name => { const i = box.querySelector(`input[name=${name}]`); return i !== null && i.checked; };
  function draw() {
    const rows = data.rows.filter(r => !off.has(r.name)), logx = on("logx"), logy = on("logy");
    const papers = on("papers"), bands = on("bands");
    const points = rows.flatMap(r => [...r.ours, ...(papers ? r.papers : [])]), levels = Object.values(data.lines);
    const least = Math.min(0, ...points.map(p => p[1]), ...levels);
    const low = (v, h) => Math.max(v - h, logy ? v / 10 : least);  // no distance is below 0, whatever a band says
    const edges = bands ? rows.flatMap(r => r.ours.flatMap(([, v, h]) => [low(v, h), v + h])) : [];
    const ys = [...points.map(p => p[1]), ...edges, ...levels].filter(v => v > 0 || !logy), xs = points.map(p => p[0]);
    if (!xs.length || !ys.length) { figure.innerHTML = "<p>nothing to show yet</p>"; return; }
    let [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    if (logx) { x0 /= 1.03; x1 *= 1.03; } else { const m = 0.02 * (x1 - x0) || 1; x0 -= m; x1 += m; }
    if (logy) { y0 /= 1.12; y1 *= 1.12; }
    else { y0 = least; y1 = y1 * 1.04 || 1; }
    const scale = (v, a, b, log) => log ? Math.log(v / a) / Math.log(b / a) : (v - a) / (b - a);
    const X = v => L + (W - L - R) * scale(v, x0, x1, logx);
    const Y = v => H - B - (H - T - B) * scale(logy ? Math.max(v, y0) : v, y0, y1, logy);
    let s = `<svg viewBox="0 0 ${W} ${H}" role="img" aria-label="${escape(data.label)} against NFE">`;
    s += `<clipPath id="plot${k}"><rect x="${L}" y="${T}" width="${W - L - R}" height="${H - T - B}"/></clipPath>`;
    for (const v of ticks(y0, y1, logy, false))
      s += `<path d="M${L} ${Y(v)}H${W - R}" stroke="#e3e3e3"/><text x="${L - 7}" y="${Y(v) + 4}" text-anchor="end">${text(v)}</text>`;
    for (const v of ticks(x0, x1, logx, true))
      s += `<path d="M${X(v)} ${T}V${H - B}" stroke="#efefef"/><text x="${X(v)}" y="${H - B + 17}" text-anchor="middle">${text(v)}</text>`;
    s += `<text x="${(W + L) / 2}" y="${H - 6}" text-anchor="middle">NFE</text>`;
    s += `<text transform="translate(13 ${(H - B) / 2}) rotate(-90)" text-anchor="middle">${escape(data.label)}</text>`;
    for (const v of levels) s += `<path d="M${L} ${Y(v)}H${W - R}" stroke="#555" stroke-dasharray="6 4"/>`;
    for (const r of rows) {
      s += `<g class="row" data-name="${escape(r.name)}"><g clip-path="url(#plot${k})">`;
      if (bands && r.ours.some(p => p[2] > 0)) {
        const below = r.ours.map(([n, v, h]) => `${X(n)} ${Y(low(v, h))}`).reverse();
        const above = r.ours.map(([n, v, h]) => `${X(n)} ${Y(v + h)}`);
        s += `<polygon class="band" points="${[...above, ...below].join(" ")}" fill="${r.colour}" opacity=".18"/>`;
      }
      const line = r.ours.map(([n, v]) => `${X(n)} ${Y(v)}`).join(" ");
      s += `<polyline points="${line}" fill="none" ${stroke(r)} stroke-width="1.8"/></g>`;
      for (const [n, v, h] of r.ours)
        s += `<circle cx="${X(n)}" cy="${Y(v)}" r="3.2" fill="${r.colour}"><title>${escape(r.name)}, NFE ${n}: ${text(v)}${h ? " ± " + text(h) : ""}</title></circle>`;
      if (papers) for (const [n, v] of r.papers)
        s += `<circle class="paper" cx="${X(n)}" cy="${Y(v)}" r="5" fill="none" stroke="${r.colour}" stroke-width="1.4" pointer-events="all"><title>${escape(r.name)}, NFE ${n}: paper ${text(v)}</title></circle>`;
      s += "</g>";
    }
    for (const [name, v] of Object.entries(data.lines)) {  // on top, and where the fewest points are
      const label = `${name}: ${text(v)}`, width = 8 * label.length;
      const inside = (from, y) => y > H - B - 8 ? Infinity : points.filter(p => X(p[0]) > from && X(p[0]) < from + width && Math.abs(Y(p[1]) - y) < 12).length;
      const places = [[W - R - width, -9], [W - R - width, 11], [L, -9], [L, 11]].map(([from, dy]) => [inside(from, Y(v) + dy), from, dy]);
      const [, from, dy] = places.reduce((best, place) => place[0] < best[0] ? place : best);
      const [x, anchor] = from === L ? [L + 4, "start"] : [W - R - 4, "end"];
      s += `<text x="${x}" y="${Y(v) + dy + 5}" text-anchor="${anchor}" paint-order="stroke" stroke="#fff" stroke-width="4">${escape(label)}</text>`;
    }
    figure.innerHTML = s + "</svg>";
  }
  for (const r of data.rows) {
    const b = document.createElement("button");
    b.type = "button"; b.title = "click: show or hide; double-click: this one alone, or all again";
    b.innerHTML = `<svg viewBox="0 0 48 6"><path d="M0 3H48" ${stroke(r)} stroke-width="3"/></svg>${escape(r.name)}`;
    b.onclick = () => { off.has(r.name) ? off.delete(r.name) : off.add(r.name); refresh(); };
    b.ondblclick = () => {  // its two clicks have undone each other
      const others = data.rows.filter(other => other !== r), alone = others.every(other => off.has(other.name));
      off.clear(); if (!alone) for (const other of others) off.add(other.name);
      refresh();
    };
    b.onmouseenter = () => { for (const g of figure.querySelectorAll("g.row")) g.classList.toggle("lit", g.dataset.name === r.name); figure.classList.add("dim"); };
    b.onmouseleave = () => figure.classList.remove("dim");
    legend.append(b);
  }
  function refresh() {
    [...legend.children].forEach((b, i) => {
      const hidden = off.has(data.rows[i].name);
      b.classList.toggle("off", hidden); b.setAttribute("aria-pressed", String(!hidden));
    });
    draw();
  }
  for (const input of box.querySelectorAll("input")) input.onchange = draw;
  refresh();
});
})();
