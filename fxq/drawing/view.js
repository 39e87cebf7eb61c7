// The picture of a graph, made interactive: open and close boxes, look things up, search, zoom.
//
// The drawing itself is fxq/drawing/svg.py's, taken from the still image; here it is only rearranged, by the same sums as in
// fxq/drawing/layout.py. Nothing is fetched, and all text from the graph goes through textContent.
"use strict";
(() => {
  const HEADER = 22, PAD = 12, ROW = 46, MARGIN = 8;
  const text = (value) => String(Math.floor(value * 10 + 0.5) / 10);

  // --- layout: fxq.drawing.layout.place ---------------------------------------------------------------------------------

  function pushed(plan, inside) {
    const wider = new Map(), shift = plan.cells.map(() => 0);
    for (const [i, size] of inside) {
      const half = plan.cells[i][4] / 2;
      wider.set(i, [Math.max(0, size.left - half), Math.max(0, size.right - half)]);
    }
    const grown = (i, end) => (wider.has(i) ? wider.get(i)[end] : 0);
    for (const [side, cells] of plan.strands) {
      const [outer, inner] = side > 0 ? [1, 0] : [0, 1];
      const away = cells.map(([i, beside]) => Math.abs(beside >= 0 ? shift[beside] : 0) + grown(beside, outer) + grown(i, inner));
      const moved = Math.max(...away);
      for (const [i] of cells) shift[i] = side * moved;
    }
    return plan.cells.map((cell, i) => cell[3] + shift[i]);
  }

  function place(plans, opened, key) {
    const plan = plans[key], inside = new Map();
    plan.cells.forEach(([kind, number], i) => {
      if (kind === "box" && opened.has(number)) inside.set(i, place(plans, opened, number));
    });
    const xs = pushed(plan, inside), rows = plan.gaps.map(() => 0), tops = [];
    plan.cells.forEach(([, , row, , , height], i) => {
      rows[row] = Math.max(rows[row], inside.has(i) ? inside.get(i).height : height);
    });
    let y = key === plans.root ? PAD : HEADER + PAD;
    rows.forEach((row, i) => {
      tops.push(y);
      y += row + plan.gaps[i];
    });
    const height = y - plan.gaps[plan.gaps.length - 1] + (rows[rows.length - 1] ? PAD : 0);
    const spots = plan.cells.map(([, , row, , width, own], i) => {
      const size = inside.get(i);
      if (size) return { x: xs[i], y: tops[row], left: size.left, right: size.right, height: size.height, inside: size };
      const top = tops[row] + Math.max(0, (Math.min(rows[row], ROW) - own) / 2);
      return { x: xs[i], y: top, left: width / 2, right: width / 2, height: own, inside: null };
    });
    const left = Math.max(0, ...spots.map((s) => s.left - s.x)) + PAD;
    const right = Math.max(Math.max(0, ...spots.map((s) => s.right + s.x)) + PAD, plan.title - left);
    const ports = new Map();
    plan.cells.forEach(([kind, number, , , , , old], i) => {
      if (kind === "in" || kind === "out") ports.set(`${kind} ${number} ${old}`, spots[i].x);
    });
    return { plan, left, right, height, spots, ports, tops, rows };
  }

  function path(placed, [tensor, a, b, start, end, old]) {
    const { plan, spots, tops, rows, height } = placed;
    const above = spots[a], below = spots[b];
    const [upper, , upperRow] = plan.cells[a], [lower, , lowerRow] = plan.cells[b];
    let x1 = above.x + start, y1 = above.y + above.height, x2 = below.x + end, y2 = below.y;
    if (above.inside) x1 = above.x + above.inside.ports.get(`out ${tensor} ${old}`);
    else if (upper === "in") [x1, y1] = [above.x, HEADER];
    else if (upper === "bend") [x1, y1] = [above.x, tops[upperRow]];
    if (below.inside) x2 = below.x + below.inside.ports.get(`in ${tensor} ${old}`);
    else if (lower === "out") [x2, y2] = [below.x, height];
    else if (lower === "bend") [x2, y2] = [below.x, tops[lowerRow]];
    const bottom = tops[upperRow] + rows[upperRow], top = tops[lowerRow], middle = (bottom + top) / 2;
    let way = `M${text(x1)} ${text(y1)}`;
    if (x1 !== x2) way += `V${text(bottom)}C${[x1, middle, x2, middle, x2, top].map(text).join(" ")}`;
    way += `V${text(y2)}`;
    return lower === "item" || lower === "box" ? `${way}m-3.5 -5l3.5 5l3.5 -5` : way;
  }

  // --- one picture ----------------------------------------------------------------------------------------------

  const child = (element, name) => [...element.children].find((c) => c.classList.contains(name));
  const make = (name, className, content) => {
    const element = document.createElement(name);
    if (className) element.className = className;
    if (content !== undefined) element.textContent = content;
    return element;
  };

  function still(root) {
    const image = root.querySelector("img.fxq-still");
    const bytes = Uint8Array.from(atob(image.src.slice(image.src.indexOf(",") + 1)), (c) => c.charCodeAt(0));
    const parsed = new DOMParser().parseFromString(new TextDecoder().decode(bytes), "image/svg+xml");
    const svg = document.importNode(parsed.documentElement, true);
    image.replaceWith(svg);
    return svg;
  }

  class Picture {
    constructor(root) {
      this.root = root;
      this.data = JSON.parse(root.querySelector("script.fxq-data").textContent);
      this.stage = root.querySelector(".fxq-stage");
      this.svg = still(root);
      this.world = this.svg.querySelector(":scope > g");
      this.elements = new Map([...this.world.querySelectorAll("[data-n]")].map((e) => [Number(e.dataset.n), e]));
      this.wires = new Map();
      for (const wire of this.world.querySelectorAll("path[data-t]")) {
        const tensor = Number(wire.dataset.t);
        if (!this.wires.has(tensor)) this.wires.set(tensor, []);
        this.wires.get(tensor).push(wire);
      }
      this.opened = new Set(this.data.opened);
      this.selected = null;
      this.scale = 1;
      this.panel = root.querySelector(".fxq-panel");
      this.bar();
      this.listen();
      this.arrange();
      this.fit(1);
      this.show(null);
      root.dataset.live = "yes";
      const linked = root.closest(".fxq-linked");
      if (linked) this.follow(linked);
    }

    // Set every coordinate that can be seen.
    arrange() {
      const placed = place(this.data.plans, this.opened, this.data.plans.root);
      this.width = placed.left + placed.right + 2 * MARGIN;
      this.height = placed.height + 2 * MARGIN;
      this.world.setAttribute("transform", `translate(${text(placed.left + MARGIN)} ${MARGIN})`);
      this.svg.setAttribute("viewBox", `0 0 ${text(this.width)} ${text(this.height)}`);
      this.fill(placed, this.world);
      this.zoom(this.scale);
    }

    fill(placed, holder) {
      const lines = [...holder.children].find((c) => c.getAttribute("fill") === "none" && c.tagName === "g");
      placed.plan.wires.forEach((wire, i) => lines.children[i].setAttribute("d", path(placed, wire)));
      placed.plan.cells.forEach(([kind, number], i) => {
        if (kind !== "item" && kind !== "box") return;
        const spot = placed.spots[i], element = this.elements.get(number);
        element.setAttribute("transform", `translate(${text(spot.x)} ${text(spot.y)})`);
        if (kind === "box") this.frame(spot.inside, element);
      });
    }

    frame(inside, element) {
      const shut = child(element, "fxq-shut"), open = child(element, "fxq-open");
      if (!inside) {
        shut.removeAttribute("display");
        open.setAttribute("display", "none");
        return;
      }
      shut.setAttribute("display", "none");
      open.removeAttribute("display");
      const [outline, head] = open.children, width = text(inside.left + inside.right);
      for (const rect of [outline, head]) {
        rect.setAttribute("x", text(-inside.left));
        rect.setAttribute("width", width);
      }
      outline.setAttribute("height", text(inside.height));
      child(open, "fxq-title").setAttribute("transform", `translate(${text(-inside.left)} 0)`);
      this.fill(inside, open);
    }

    zoom(scale) {
      this.scale = Math.min(4, Math.max(0.05, scale));
      this.svg.style.width = `${this.width * this.scale}px`;
      this.svg.style.height = `${this.height * this.scale}px`;
    }

    // As wide as the stage, but not larger than `most`.
    fit(most, whole = false) {
      const room = [(this.stage.clientWidth - 4) / this.width];
      if (whole) room.push((this.stage.clientHeight - 4) / this.height);
      this.zoom(Math.min(most, ...room.filter((r) => r > 0)));
    }

    toggle(number, open = !this.opened.has(number)) {
      const box = this.elements.get(number), before = box.getBoundingClientRect();
      this.opened[open ? "add" : "delete"](number);
      this.arrange();
      const after = box.getBoundingClientRect();
      this.stage.scrollLeft += after.left - before.left;
      this.stage.scrollTop += after.top - before.top;
    }

    reveal(number) {
      for (let box = this.data.items[number].box; box !== this.data.plans.root; box = this.data.items[box].box) this.opened.add(box);
      this.arrange();
      const at = this.elements.get(number).getBoundingClientRect(), frame = this.stage.getBoundingClientRect();
      this.stage.scrollLeft += at.left + at.width / 2 - frame.left - frame.width / 2;
      this.stage.scrollTop += at.top + at.height / 2 - frame.top - frame.height / 2;
    }

    select(number) {
      this.selected = number;
      for (const marked of this.world.querySelectorAll(".fxq-selected, .fxq-related, .fxq-hot")) {
        marked.classList.remove("fxq-selected", "fxq-related", "fxq-hot");
      }
      if (number !== null) {
        const item = this.data.items[number];
        this.elements.get(number).classList.add("fxq-selected");
        for (const other of item.related) {
          this.elements.get(other).classList.add("fxq-related");
          if (item.follow) this.heat(other);
        }
        this.heat(number);
      }
      this.show(number);
    }

    heat(tensor) {
      for (const wire of this.wires.get(tensor) || []) wire.classList.add("fxq-hot");
    }

    // What the panel says: of an item, or how to use the picture.
    show(number) {
      const words = this.data.words;
      if (number === null) {
        this.panel.replaceChildren(make("p", "fxq-hint", this.data.hint));
        return;
      }
      const item = this.data.items[number], list = make("dl");
      for (const [label, value] of item.facts) list.append(make("dt", "", words[label]), make("dd", "", words[value]));
      this.panel.replaceChildren(make("h4", "", words[item.title]), list);
    }

    // A table beside the picture names nodes; a click on one selects it.
    follow(table) {
      table.addEventListener("click", (event) => {
        const name = event.target.closest("[data-node]")?.dataset.node;
        const number = this.data.items.findIndex((item) => this.data.words[item.title].endsWith(`  ${name}`));
        if (name === undefined || number < 0) return;
        this.select(number);
        this.reveal(number);
        this.root.scrollIntoView({ block: "nearest" });
      });
    }

    search(query, step) {
      const wanted = query.trim().toLowerCase();
      const named = (item) => this.data.words[item.title].toLowerCase().includes(wanted);
      const all = this.data.items.flatMap((item, i) => (wanted && this.elements.has(i) && this.matches(item, wanted) ? [i] : []));
      const found = [...all.filter((i) => named(this.data.items[i])), ...all.filter((i) => !named(this.data.items[i]))];
      this.world.querySelectorAll(".fxq-found").forEach((e) => e.classList.remove("fxq-found"));
      found.forEach((number) => this.elements.get(number).classList.add("fxq-found"));
      this.hits.textContent = wanted ? `${found.length} found` : "";
      if (!step || !found.length) return;
      const at = found.indexOf(this.selected);
      const next = found[(at + step + found.length) % found.length];
      this.select(next);
      this.reveal(next);
    }

    matches(item, wanted) {
      const words = this.data.words;
      return [item.title, ...item.facts.map(([, value]) => value)].some((w) => words[w].toLowerCase().includes(wanted));
    }

    bar() {
      const bar = this.root.querySelector(".fxq-bar"), tools = make("span", "fxq-tools");
      const button = (label, title, action) => {
        const made = make("button", "", label);
        made.type = "button";
        made.title = title;
        made.addEventListener("click", action);
        tools.append(made);
      };
      const field = make("input");
      field.type = "search";
      field.placeholder = "search: Enter goes on";
      field.setAttribute("aria-label", "search nodes, modules, rules");
      field.addEventListener("input", () => this.search(field.value, 0));
      field.addEventListener("keydown", (event) => {
        event.stopPropagation();
        if (event.key === "Enter") this.search(field.value, event.shiftKey ? -1 : 1);
      });
      this.hits = make("span", "fxq-hits");
      tools.append(field, this.hits);
      button("−", "smaller", () => this.zoom(this.scale / 1.25));
      button("+", "larger", () => this.zoom(this.scale * 1.25));
      button("whole", "all of it", () => this.fit(1, true));
      button("1:1", "full size", () => this.zoom(1));
      button("open all", "open every module", () => this.all(true));
      button("close all", "close every module", () => this.all(false));
      bar.prepend(tools);
    }

    all(open) {
      const boxes = Object.keys(this.data.plans).map(Number).filter((n) => Number.isInteger(n) && n !== this.data.plans.root);
      this.opened = new Set(open ? boxes : []);
      this.arrange();
    }

    listen() {
      const under = (event) => {
        const hit = event.target.closest("[data-n]");
        return hit && this.world.contains(hit) ? Number(hit.dataset.n) : null;
      };
      let drag = null, moved = false;
      this.svg.addEventListener("click", (event) => {
        const number = under(event);
        if (moved) return;
        this.select(number);
        const box = number !== null && this.elements.get(number).classList.contains("fxq-box");
        if (box && (!this.opened.has(number) || event.target.closest(".fxq-title, .fxq-head"))) this.toggle(number);
      });
      this.svg.addEventListener("mousemove", (event) => {
        if (!event.movementX && !event.movementY) return; // the picture moved, not the mouse
        const number = under(event);
        this.show(number === null ? this.selected : number);
      });
      this.svg.addEventListener("mouseleave", () => this.show(this.selected));
      this.stage.addEventListener("wheel", (event) => {
        if (!event.ctrlKey && !event.metaKey) return;
        event.preventDefault();
        const frame = this.stage.getBoundingClientRect(), before = this.scale;
        const x = event.clientX - frame.left + this.stage.scrollLeft, y = event.clientY - frame.top + this.stage.scrollTop;
        this.zoom(this.scale * Math.exp(-event.deltaY / 300));
        this.stage.scrollLeft += x * (this.scale / before - 1);
        this.stage.scrollTop += y * (this.scale / before - 1);
      }, { passive: false });
      this.stage.addEventListener("pointerdown", (event) => {
        if (event.button === 0) drag = { x: event.clientX, y: event.clientY };
        moved = false;
      });
      this.stage.addEventListener("pointermove", (event) => {
        if (!drag || !(event.buttons & 1)) return;
        moved = moved || Math.hypot(event.clientX - drag.x, event.clientY - drag.y) > 4;
        if (!moved) return;
        this.stage.scrollLeft -= event.movementX;
        this.stage.scrollTop -= event.movementY;
      });
      this.stage.addEventListener("pointerup", () => { drag = null; });
      this.root.addEventListener("keydown", (event) => {
        if (event.key === "Escape") this.select(null);
      });
    }
  }

  // --- a row of pictures with a slider --------------------------------------------------------------------------

  function slide(root) {
    const steps = [...root.querySelectorAll(":scope > details")], tools = make("div", "fxq-slider");
    const range = make("input"), name = make("output");
    range.type = "range";
    Object.assign(range, { min: 0, max: steps.length - 1, step: 1, value: 0 });
    range.setAttribute("aria-label", "pass");
    const go = () => {
      steps.forEach((step, i) => {
        step.open = i === Number(range.value);
        step.hidden = !step.open;
      });
      const step = steps[Number(range.value)];
      name.textContent = `${Number(range.value) + 1} of ${steps.length}: ${step.querySelector("summary").textContent}`;
      step.querySelectorAll(".fxq-view:not([data-live])").forEach((view) => new Picture(view));
    };
    range.addEventListener("input", go);
    tools.append(range, name);
    root.prepend(tools);
    root.dataset.live = "yes";
    go();
  }

  function begin() {
    document.querySelectorAll(".fxq-steps:not([data-live])").forEach(slide);
    document.querySelectorAll(".fxq-view:not([data-live])").forEach((view) => {
      if (!view.closest(".fxq-steps")) new Picture(view);
    });
  }
  begin();
})();
