// The explorer's page: draws the session's JSON view and sends commands. No dependency, nothing from the network.
// In Jupyter `model` is anywidget's (messages over the comm); on the command-line page it is page.js's (the same messages over fetch).

const SIDES = { teacher: "teacher", student: "student", after: "student, after distillation" };

// ---------------------------------------------------------------- small tools

/** An element: h("button.primary", {onclick, "aria-label": ...}, ...children). */
function h(kind, attributes = {}, ...children) {
  const [tag, ...classes] = kind.split(".");
  const node = document.createElement(tag || "div");
  if (classes.length) node.className = classes.join(" ");
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "css") Object.entries(value).forEach(([key, each]) => node.style.setProperty(key, each));
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const fill = (node, ...children) => node.replaceChildren(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));

/** A number for people: sign where it has one to tell, three digits. */
function shown(value, { sign = false } = {}) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  const text = size === 0 ? "0" : size >= 100 ? value.toFixed(0) : size >= 10 ? value.toFixed(1) : size >= 1 ? value.toFixed(2) : size >= 0.001 ? value.toFixed(3) : value.toExponential(1);
  return (sign && value > 0 ? `+${text}` : text).replace("-", "−");
}

const percent = (value) => (value === null || value === undefined ? "–" : `${Math.round(100 * value)} %`.replace("-", "−"));
const rgb = (hex) => [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));

/** The colour at a place (0 to 1) of evenly spaced colours. */
function mixed(colours, place) {
  const at = Math.max(0, Math.min(1, place)) * (colours.length - 1);
  const low = Math.min(Math.floor(at), colours.length - 2);
  const [a, b] = [rgb(colours[low]), rgb(colours[low + 1])];
  return `rgb(${a.map((value, i) => Math.round(value + (b[i] - value) * (at - low))).join(",")})`;
}

/** Tokens as text: spaces and line ends made visible where a token is nothing else. */
const visible = (token) => (token.trim() ? token : token.replaceAll("\n", "⏎").replaceAll(" ", "␣") || "∅");

// ---------------------------------------------------------------- talking to the session

/** Sends commands one after another, applies the newest view, and polls while something is being computed. */
class Wire {
  constructor(model, { apply, waiting, polling }) {
    Object.assign(this, { model, apply, waiting, polling, sent: 0, applied: 0, open: new Set(), timer: null, slow: null });
    this.listener = (message) => this.heard(message);
    model.on("msg:custom", this.listener);
  }

  ask(command) {
    clearTimeout(this.timer);
    this.timer = null;
    const id = ++this.sent;
    this.open.add(id);
    this.slow ??= setTimeout(() => this.waiting(true), 2500);
    this.model.send({ id, command });
  }

  heard(message) {
    if (message?.id === null) return this.applied && this.apply(message.view); // Python changed the view
    if (!this.open.delete(message?.id)) return;
    if (!this.open.size) {
      clearTimeout(this.slow);
      this.slow = null;
      this.waiting(false);
    }
    if (message.failure) return this.apply({ failure: message.failure });
    if (message.id >= this.applied) {
      this.applied = message.id;
      this.pending = message.view.pending?.length;
      this.apply(message.view);
    }
    if (this.pending && !this.open.size) this.timer = setTimeout(() => (this.polling(), this.ask({ do: "poll" })), 40);
  }

  close() {
    clearTimeout(this.timer);
    clearTimeout(this.slow);
    this.model.off("msg:custom", this.listener);
  }
}

// ---------------------------------------------------------------- the page

class Page {
  constructor(model, el) {
    this.model = model;
    this.drawn = {}; // what each section was last drawn from
    this.before = {}; // side -> the circuit's numbers before its last change
    this.grids = {};
    this.query = null;
    this.choice = model.get("theme") || "auto";
    this.root = h("section.wbx", { "aria-label": "Workbench explorer", "data-lm-suppress-shortcuts": "true", "data-ready": "false" });
    el.replaceChildren(this.root);
    this.root.addEventListener("keydown", (event) => this.key(event));
    this.watchTheme();
    this.wire = new Wire(model, { apply: (view) => this.update(view), waiting: (busy) => this.waiting(busy), polling: () => (this.polled = true) });
    this.wire.ask({ do: "hello" });
    this.followed = () => this.follow();
    if (model.fragment) addEventListener("hashchange", this.followed);
  }

  ask(command) {
    this.polled = false;
    this.wire.ask(command);
  }

  close() {
    this.wire.close();
    removeEventListener("hashchange", this.followed);
    this.media?.removeEventListener("change", this.themed);
    this.observer?.disconnect();
    this.resized?.disconnect();
  }

  // ---- theme: of the system, of JupyterLab or VS Code, or as chosen
  watchTheme() {
    this.themed = () => this.view && this.retheme();
    this.media = window.matchMedia("(prefers-color-scheme: dark)");
    this.media.addEventListener("change", this.themed);
    this.observer = new MutationObserver(this.themed);
    this.observer.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-vscode-theme-kind", "class"] });
  }

  get dark() {
    if (this.choice !== "auto") return this.choice === "dark";
    const { jpThemeLight, vscodeThemeKind } = document.body.dataset;
    if (jpThemeLight !== undefined) return jpThemeLight === "false";
    if (vscodeThemeKind !== undefined) return vscodeThemeKind.includes("dark");
    return this.media.matches;
  }

  retheme() {
    const now = this.dark ? "dark" : "light";
    if (this.themeNow === now) return;
    this.themeNow = now;
    const colours = (this.colours = this.setup.colours[now]);
    for (const name of ["background", "ink", "muted", "grid", "missing", "helps", "hurts", "font", "mono"]) this.root.style.setProperty(`--${name}`, colours[name]);
    this.root.style.setProperty("--accent", colours.categories[0]);
    this.root.style.setProperty("color-scheme", now);
    this.root.dataset.theme = now;
    document.querySelector("body.wbx-page")?.style.setProperty("background", colours.background);
    this.drawn = {};
    if (this.view) this.draw(this.view);
  }

  // ---- from view to page
  update(view) {
    if (view.failure) return this.tell(view.failure, "error");
    if (view.setup) this.begin(view.setup);
    this.view = view;
    if (!this.themeNow) this.retheme();
    this.draw(view);
    const begun = (view.setup && this.follow()) || this.beginWithStrongest(view);
    if (!begun) this.writeFragment();
    if (view.error) this.tell(view.error, "error", view.asks && this.overwrite());
    else if (view.notice) this.tell(view.notice, "notice");
    else if (this.said && !this.polled) this.tell("", "");
    if (this.damaged && !begun) this.tell("The link's end can't be read; it is ignored.", "error");
    if (!begun) this.damaged = false;
    this.root.dataset.ready = String(!view.pending.length && !begun);
  }

  /** At the start the head that helps most is in view, so that no half of the page is empty. */
  beginWithStrongest({ maps, selected }) {
    if (this.hasBegun) return false;
    const [side, panel] = Object.entries(maps.panels).find(([, each]) => each && !each.error) ?? [];
    if (selected.head || !panel) return (this.hasBegun = Boolean(selected.head)) && false;
    this.hasBegun = true;
    const layer = panel.ranks.findIndex((row) => row.includes(1));
    if (layer < 0) return false;
    this.ask({ do: "select", side, head: `L${layer}H${panel.ranks[layer].indexOf(1)}` });
    return true;
  }

  // ---- links: the view in the address's fragment
  /** Ask for the view that the address names; whether one is asked for. */
  follow() {
    const text = this.model.fragment?.read() ?? "";
    if (!text.startsWith("view=") || text === this.written) return false;
    this.written = text;
    let link;
    try {
      link = JSON.parse(decodeURIComponent(text.slice(5)));
    } catch {
      this.damaged = true;
      return false;
    }
    this.hasBegun = Boolean(link?.select);
    this.showCode(link?.open === "code");
    this.ask({ do: "restore", view: link });
    return true;
  }

  writeFragment() {
    if (!this.model.fragment || this.wire.open.size) return;
    this.written = `view=${encodeURIComponent(JSON.stringify({ ...this.view.link, open: this.at.codePanel.hidden ? "" : "code" }))}`;
    this.model.fragment.write(this.written);
  }

  /** What asks before a circuit's file is overwritten. */
  overwrite() {
    return h("button", { type: "button", "data-do": "overwrite", onclick: () => this.saving && this.ask({ ...this.saving, overwrite: true }) }, "Overwrite");
  }

  /** Choose a head; where the columns stand below each other (a phone), a tap also brings its card into view. */
  choose(side, head, event) {
    this.hasBegun = true;
    this.ask({ do: "select", side, head });
    if (event.detail > 0 && this.narrow) this.at.headCard.scrollIntoView({ block: "start", behavior: "instant" });
  }

  get narrow() {
    return getComputedStyle(this.at.columns).gridTemplateColumns.split(" ").length === 1;
  }

  /** Draw a section again only when what it shows has changed, so that focus and pointer stay where they are. */
  section(name, data, draw) {
    const key = JSON.stringify(data);
    if (this.drawn[name] === key) return;
    this.drawn[name] = key;
    draw();
  }

  draw(view) {
    this.section("pair", view.pair, () => this.drawPair(view));
    this.section("prompts", [view.prompts, view.settings.metric], () => this.drawPrompts(view));
    this.section("settings", [view.settings, view.stopped], () => this.drawSettings(view));
    const members = Object.fromEntries(Object.entries(view.circuits).map(([side, each]) => [side, each.heads]));
    this.section("maps", [view.maps, view.selected, members], () => this.drawMaps(view));
    this.section("compare", [view.beside, view.beside && view.head, view.settings], () => this.drawCompare(view));
    this.section("head", [view.head, view.matches, view.pair, Boolean(view.beside), view.settings.weighted, view.settings.metric, view.settings.position], () => this.drawHead(view));
    this.section("thumbnails", [view.thumbnails, view.selected], () => this.drawThumbnails(view));
    this.section("shares", [view.attribution, view.selected], () => this.drawShares(view));
    this.section("circuits", [view.circuits, view.settings, view.undo, view.selected.side, view.sources], () => this.drawCircuits(view));
    this.section("code", view.code, () => (this.at.code.textContent = view.code));
    this.section("status", [view.pending, view.stopped], () => this.drawStatus(view));
    this.at.undo.disabled = !view.undo;
    this.at.undo.title = view.undo ? `Undo: ${view.undo}` : "Nothing to undo";
  }

  /** The frame, once. */
  begin(setup) {
    this.setup = setup;
    this.drawn = {};
    this.grids = {};
    const at = (this.at = {});
    const button = (text, onclick, more = {}) => h("button", { type: "button", onclick, ...more }, text);
    at.undo = button("Undo", () => this.ask({ do: "undo" }), { "data-do": "undo" });
    at.codeButton = button("Export", () => this.showCode(at.codePanel.hidden), { "data-do": "code", "aria-expanded": "false" });
    at.linkButton = this.model.fragment ? button("Copy link", () => this.copyLink(), { "data-do": "link", title: "A link that opens this view again, as long as this explorer runs" }) : null;
    at.theme = button("◐", () => this.turnTheme(), { title: "Light or dark", "aria-label": "Light or dark" });
    at.message = h("p.message", { role: "alert" });
    at.status = h("div.status", { role: "status", "aria-live": "polite" });
    at.waiting = h("p.waiting", { hidden: true }, "Waiting for the kernel: it is busy with something else.");
    at.code = h("pre.code", { tabindex: "0", "aria-label": "Python lines" });
    at.codePanel = h("div.card.codepanel", { hidden: true }, h("div.row", {}, h("h3", {}, "Python that reproduces this view"), button("Copy", () => this.copy(at.code, "The Python lines are"), { "data-do": "copy" }), h("span.grow"), button("Python file", () => this.download("explorer.py", this.view.code), { "data-do": "python" }), button("JSON", () => this.download("explorer.json", JSON.stringify(this.view, null, 1)), { "data-do": "json", title: "All numbers in view" }), button("PNG", () => this.picture(), { "data-do": "png", title: "The maps and the attention in view" })), at.code);
    for (const name of ["pair", "prompts", "settings", "maps", "head", "circuits", "shares", "thumbnails"]) at[name] = h("div");
    at.compare = h("div.card.comparecard", { hidden: true });
    at.headsCard = h("div.card.headscard", {}, h("h3", {}, "Heads"), at.settings, at.maps);
    const back = button("↑ Map", () => at.maps.scrollIntoView({ block: "start", behavior: "instant" }), { "data-do": "back", title: "Back to the map of heads", class: "back" });
    at.headCard = h("div.card.headcard", {}, back, at.head);
    at.columns = h("div.columns", {}, h("div.left", {}, at.headsCard, h("div.card", {}, at.thumbnails), h("div.card", {}, h("h3", {}, "Circuits"), at.circuits), h("div.card", {}, at.shares)), at.headCard);
    at.tip = h("div.tip", { role: "tooltip", hidden: true });
    const names = setup.models.map((each) => h("span.model", {}, h("b", {}, SIDES[each.side]), ` ${shortName(each.name)} · ${each.layers} × ${each.heads} heads`));
    fill(
      this.root,
      h("header", {}, h("h2", {}, "Explorer"), h("span.task", {}, setup.material.title), names, h("span.grow"), at.undo, at.linkButton ?? [], at.codeButton, at.theme),
      h("div.line", {}, at.status, at.message),
      at.waiting,
      at.codePanel,
      h("div.card", {}, at.pair, at.prompts),
      at.compare,
      at.columns,
      at.tip,
    );
    this.resized ??= new ResizeObserver(() => this.matrix && this.drawMatrix());
    this.resized.disconnect();
    this.resized.observe(this.root);
  }

  tell(text, kind, more = null) {
    this.said = kind;
    this.at ? fill(this.at.message, text, more && [" ", more]) : fill(this.root, h("p.message.error", { role: "alert" }, text));
    if (this.at) this.at.message.className = `message ${kind}`;
  }

  waiting(busy) {
    if (this.at) this.at.waiting.hidden = !busy;
  }

  turnTheme() {
    this.choice = this.dark ? "light" : "dark";
    this.retheme();
  }

  showCode(open) {
    this.at.codePanel.hidden = !open;
    this.at.codeButton.setAttribute("aria-expanded", String(open));
    if (this.written) this.writeFragment();
  }

  async copy(node, what) {
    try {
      await navigator.clipboard.writeText(node.textContent);
      this.tell(`${what} on the clipboard.`, "notice");
    } catch {
      const range = document.createRange();
      range.selectNodeContents(node);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      this.tell(`${what} selected: copy with the keyboard.`, "notice", node.isConnected ? null : node);
    }
  }

  copyLink() {
    this.writeFragment();
    this.copy(h("code.link", {}, location.href), "The link to this view is");
  }

  // ---- export
  download(name, content) {
    const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type: "text/plain" }));
    const link = h("a", { href: url, download: name });
    this.root.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }

  /** The maps, their scale and the attention in view as one picture. */
  picture() {
    const [maps, size, edge] = [this.setup.models.map((each) => ({ ...each, panel: this.view.maps.panels[each.side] })), 22, 24];
    const widths = maps.map((each) => Math.max(150, each.heads * size + 30));
    const tallest = Math.max(...maps.map((each) => each.layers)) * size;
    const matrix = this.matrix?.canvas;
    const shown = matrix ? 330 : 0;
    const [width, height] = [widths.reduce((sum, each) => sum + each + edge, edge) + shown, Math.max(tallest, shown) + 130];
    const canvas = h("canvas", { width: 2 * width, height: 2 * height });
    const draw = canvas.getContext("2d");
    const write = (text, x, y, font = "12px", colour = this.colours.ink, room = width - x - 8) => Object.assign(draw, { font: `${font} ${this.colours.font}`, fillStyle: colour }).fillText(text, x, y, room);
    draw.scale(2, 2);
    draw.fillStyle = this.colours.background;
    draw.fillRect(0, 0, width, height);
    const method = this.setup.methods.find((each) => each.value === this.view.settings.method);
    write(`${this.setup.material.title}: ${method.title}`, edge, 26, "bold 14px");
    let left = edge;
    maps.forEach(({ side, layers, heads, panel }, place) => {
      write(SIDES[side], left, 48, "bold 12px", this.colours.ink, widths[place]);
      for (let layer = 0; layer < layers; layer++) {
        const top = 58 + (layers - 1 - layer) * size;
        write(String(layer), left, top + 15, "10px", this.colours.muted);
        for (let index = 0; index < heads; index++) {
          const value = panel?.values?.[layer][index] ?? null;
          draw.fillStyle = value === null ? this.colours.missing : mixed(this.colours.diverging, 0.5 + value / this.view.maps.largest / 2);
          draw.fillRect(left + 20 + index * size, top, size - 1, size - 1);
          if (!this.view.circuits[side].heads.some((each) => each.head === `L${layer}H${index}`)) continue;
          Object.assign(draw, { strokeStyle: this.colours.ink, lineWidth: 2 }).strokeRect(left + 21 + index * size, top + 1, size - 3, size - 3);
        }
      }
      left += widths[place] + edge;
    });
    if (matrix) {
      write(`${this.view.head.head} of the ${SIDES[this.view.head.side]}: attention`, left, 48, "bold 12px");
      draw.drawImage(matrix, left, 58, shown - edge, shown - edge);
    }
    const panel = maps.map((each) => each.panel).find((each) => each?.unit);
    const scale = draw.createLinearGradient(edge, 0, edge + 200, 0);
    this.colours.diverging.forEach((colour, place, all) => scale.addColorStop(place / (all.length - 1), colour));
    draw.fillStyle = scale;
    draw.fillRect(edge, height - 44, 200, 10);
    write(shownEnd(-this.view.maps.largest), edge, height - 20, "11px", this.colours.muted);
    write(shownEnd(this.view.maps.largest), edge + 170, height - 20, "11px", this.colours.muted);
    write(`${panel?.unit ?? ""}; framed: in the circuit`, edge + 220, height - 34, "11px", this.colours.muted);
    canvas.toBlob((blob) => this.download("explorer.png", blob), "image/png");
  }

  // ---- the pair
  drawPair({ pair }) {
    const { pairs, title } = this.setup.material;
    const pick = h("select", { "aria-label": "Pair", "data-do": "pick", onchange: (event) => this.ask({ do: "pick", index: Number(event.target.value) }) });
    if (pair.picked === null) pick.append(h("option", { value: "", selected: true, disabled: true }, "your own pair"));
    pairs.forEach((each, index) => pick.append(h("option", { value: index, selected: index === pair.picked }, `${index + 1}. … ${each.clean.slice(-38)} →${each.answer}`)));
    const step = (by) => () => this.ask({ do: "pick", index: ((pair.picked ?? 0) + by + pairs.length) % pairs.length });
    const fields = { clean: this.field("textarea", "clean", "Clean prompt", pair), corrupt: this.field("textarea", "corrupt", "Corrupt prompt, as many tokens", pair), answer: this.field("input", "answer", "Answer", pair), distractor: this.field("input", "distractor", "Wrong answer", pair) };
    const use = () => this.ask({ do: "type", ...Object.fromEntries(Object.entries(fields).map(([name, field]) => [name, field.lastChild.value])) });
    const form = h("form.typing", { onsubmit: (event) => (event.preventDefault(), use()) }, Object.values(fields), h("button.primary", { type: "submit", "data-do": "type" }, "Use this pair"));
    const details = h("details", { open: this.typing, ontoggle: (event) => (this.typing = event.target.open) }, h("summary", {}, "Type a pair"), form);
    fill(
      this.at.pair,
      h("div.row", {}, h("h3", {}, "Prompt"), pick, h("button", { type: "button", "aria-label": "Previous pair", title: "Previous pair", onclick: step(-1) }, "‹"), h("button", { type: "button", "aria-label": "Next pair", title: "Next pair", onclick: step(1) }, "›"), h("span.muted", {}, `${pairs.length} pairs of ${title}`), this.setup.material.cut ? h("small", { "data-cut": "" }, this.setup.material.cut) : []),
      details,
    );
  }

  field(kind, name, label, pair) {
    const input = h(kind, { name, spellcheck: "false", autocomplete: "off", ...(kind === "textarea" ? { rows: 2 } : {}) });
    input.value = pair[name];
    return h(`label.${name}`, {}, label, input);
  }

  drawPrompts({ prompts, settings }) {
    const first = Object.values(prompts).find((each) => each && !each.error);
    const lines = first && [this.tokenLine("clean", first.clean, first.corrupt), this.tokenLine("corrupt", first.corrupt, first.clean)];
    const metric = this.setup.metrics.find((each) => each.value === settings.metric).title;
    const cards = Object.entries(prompts).map(([side, each]) => this.predictions(side, each, settings.metric, metric));
    fill(this.at.prompts, h("div.tokens", {}, lines || h("p.muted", {}, "…")), h("div.predictions", {}, cards));
  }

  tokenLine(name, mine, other) {
    const tokens = mine.tokens.map((token, index) => h(mine.ids[index] === other.ids[index] ? "span.token" : "span.token.differs", { title: `token ${index}, id ${mine.ids[index]}${mine.ids[index] === other.ids[index] ? "" : "; underlined: it differs between the clean and the corrupt prompt"}` }, visible(token)));
    return h("div.tokenline", {}, h("span.label", {}, name), h("div.text", {}, tokens));
  }

  predictions(side, found, metric, title) {
    if (!found) return h("div.prediction", {}, h("h4", {}, SIDES[side]), h("p.muted", {}, "…"));
    if (found.error) return h("div.prediction", {}, h("h4", {}, SIDES[side]), h("p.error", {}, found.error));
    const side_ = (name) => {
      const each = found[name];
      const rows = each.top.map(([token, p, kind]) => {
        const mark = { answer: "answer", distractor: "wrong answer", other: "" }[kind];
        return h(`li.${kind}`, { title: `${token}: ${(100 * p).toFixed(2)} %${mark && `, the ${mark}`}` }, h("span.bar", { css: { "--w": `${100 * p}%` } }), h("code", {}, visible(token)), mark ? h("span.mark", {}, kind === "answer" ? "✓" : "✗") : null, h("span.number", {}, percent(p)));
      });
      return h("div", {}, h("h5", {}, `${name}: `, h("b.metric", { "data-metric": `${side}-${name}` }, shown(each.metrics[metric], { sign: metric !== "probability" }))), h("ol", {}, rows));
    };
    return h("div.prediction", {}, h("h4", {}, SIDES[side], h("span.muted", {}, ` ${title}; the answer is rank ${found.clean.answer.rank} of the clean prompt`)), h("div.two", {}, side_("clean"), side_("corrupt")));
  }

  // ---- the heat maps
  drawSettings({ settings, stopped }) {
    const select = (name, label, options, disabled = false) =>
      h("label", {}, label, h("select", { "data-set": name, disabled, onchange: (event) => this.ask({ do: "set", [name]: event.target.value }) }, options.map((each) => h("option", { value: each.value, selected: each.value === settings[name] }, each.title))));
    const over = h("label", {}, "over", h("select", { "data-set": "average", onchange: (event) => this.ask({ do: "set", average: event.target.value === "all" }) }, h("option", { value: "one", selected: !settings.average }, "this pair"), h("option", { value: "all", selected: settings.average }, `all ${this.setup.material.pairs.length} pairs (mean)`)));
    const positions = settings.positions.map((value) => ({ value, title: value === "all" ? "all tokens" : value.replaceAll("_", " ") }));
    const method = this.setup.methods.find((each) => each.value === settings.method);
    fill(
      this.at.settings,
      h("div.row.controls", {}, select("method", "method", this.setup.methods), select("metric", "metric", this.setup.metrics), settings.method === "path" ? select("acts", "at", [{ value: "last", title: "last token" }], true) : select("position", "at", positions), over),
      h("p.explain", {}, method.does, " ", h("span", {}, method.sign)),
    );
  }

  drawMaps(view) {
    const { panels, largest } = view.maps;
    const ready = Object.values(panels).find((each) => each && !each.error);
    if (!this.grids.frame) {
      const widest = this.setup.models.reduce((sum, each) => sum + each.heads, 0);
      const tallest = Math.max(...this.setup.models.map((each) => each.layers));
      this.cell = [Math.max(13, Math.min(36, Math.floor(500 / widest))), Math.max(13, Math.min(28, Math.floor(460 / tallest)))];
      this.grids.frame = h("div.maps");
      this.grids.legend = h("div.legend");
      this.setup.models.forEach((each) => this.grids.frame.append((this.grids[each.side] = this.grid(each)).node));
      fill(this.at.maps, this.grids.frame, this.grids.legend);
    }
    this.setup.models.forEach((each) => this.paint(each, view, panels[each.side], largest));
    const ticks = [-largest, -largest / 2, 0, largest / 2, largest].map((value) => h("span", {}, shown(value, { sign: true })));
    const bar = h("div.scale", { css: { background: `linear-gradient(to right, ${this.colours.diverging.join(",")})` } });
    fill(this.grids.legend, ready ? [h("div", {}, bar, h("div.ticks", {}, ticks)), h("span.muted", {}, `${ready.examples > 1 ? "mean " : ""}${ready.unit}`, h("br"), "framed: in the circuit · ring: in view · layers upward, heads across", this.estimates(panels))] : null);
  }

  /** How much of the maps is estimated as yet. */
  estimates(panels) {
    const cells = Object.values(panels).flatMap((panel) => panel?.estimated?.flat() ?? []);
    const count = cells.filter(Boolean).length;
    return count ? [h("br"), h("b", { "data-estimated": count }, `striped: ${count} of ${cells.length} heads are estimated by attribution; exact ones follow, the largest first`)] : [];
  }

  /** One model's cells, made once: a grid that arrow keys walk through. */
  grid({ side, layers, heads }) {
    const cells = {};
    const node = h("div.map", { role: "grid", "aria-label": `Heads of the ${side}`, "data-map": side, "aria-rowcount": layers, "aria-colcount": heads });
    const [width, height] = this.cell;
    for (let layer = layers - 1; layer >= 0; layer--) {
      const row = h("div.maprow", { role: "row" }, h("span.axis.layer", { role: "rowheader", "aria-label": `layer ${layer}` }, layers > 16 && layer % 2 ? "" : String(layer)));
      for (let index = 0; index < heads; index++) {
        const name = `L${layer}H${index}`;
        const cell = h("button.cell", { type: "button", role: "gridcell", tabindex: layer === layers - 1 && index === 0 ? "0" : "-1", "data-head": name, css: { width: `${width}px`, height: `${height}px` } });
        cell.addEventListener("click", (event) => this.choose(side, name, event));
        cell.addEventListener("keydown", (event) => this.walk(event, side, layer, index));
        cell.addEventListener("pointerenter", () => this.tip(cell, cell.dataset.tip));
        cell.addEventListener("focus", () => (this.rove(side, name), cell.matches(":focus-visible") && this.tip(cell, cell.dataset.tip)));
        for (const gone of ["pointerleave", "blur"]) cell.addEventListener(gone, () => this.tip(null));
        cells[name] = cell;
        row.append(cell);
      }
      node.append(row);
    }
    const below = Array.from({ length: heads }, (_, index) => h("span.axis", { css: { width: `${width}px` } }, heads > 16 && index % 2 ? "" : String(index)));
    node.append(h("div.maprow", { "aria-hidden": "true" }, h("span.axis.layer"), below));
    const title = h("h4", {}, SIDES[side]);
    const note = h("p.error", { hidden: true });
    return { node: h("div.panel", {}, title, node, note), cells, note, grid: node };
  }

  paint({ side, layers, heads }, view, panel, largest) {
    const { cells, note, grid } = this.grids[side];
    const members = Object.fromEntries(view.circuits[side].heads.map((each) => [each.head, each.role]));
    note.hidden = !panel?.error;
    note.textContent = panel?.error ?? "";
    grid.classList.toggle("waiting-map", !panel);
    grid.setAttribute("aria-busy", String(!panel));
    for (let layer = 0; layer < layers; layer++)
      for (let index = 0; index < heads; index++) {
        const name = `L${layer}H${index}`;
        const cell = cells[name];
        const value = panel?.values?.[layer][index] ?? null;
        const strong = value !== null && Math.abs(value) > this.colours.strong * largest;
        cell.style.setProperty("background", value === null ? "var(--grid)" : mixed(this.colours.diverging, 0.5 + value / largest / 2));
        cell.style.setProperty("color", strong ? this.colours.strong_ink : this.colours.ink);
        cell.classList.toggle("member", name in members);
        const guessed = Boolean(panel?.estimated?.[layer][index]);
        cell.classList.toggle("estimated", guessed);
        cell.textContent = name in members && this.cell[0] > 20 ? initials(members[name]) : panel && value === null ? "×" : "";
        const chosen = view.selected.head === name && view.selected.side === side;
        cell.setAttribute("aria-selected", String(chosen));
        const lines = [`${name} of the ${side}`];
        if (value === null) lines.push(panel ? "×: not measured" : "being computed");
        else {
          lines.push(`${guessed ? "≈ " : ""}${shown(value, { sign: true })}, rank ${panel.ranks[layer][index]} of ${panel.measured}`);
          if (guessed) lines.push("estimated by attribution; the exact value follows");
          else if (panel.low) lines.push(`95 % interval ${shown(panel.low[layer][index], { sign: true })} to ${shown(panel.high[layer][index], { sign: true })}`);
        }
        if (name in members) lines.push(`framed: in the circuit; ${initials(members[name])}: ${members[name].replaceAll("_", " ")}`);
        cell.dataset.tip = lines.join("\n");
        cell.setAttribute("aria-label", lines.join(", "));
      }
  }

  rove(side, name) {
    Object.entries(this.grids[side].cells).forEach(([each, cell]) => cell.setAttribute("tabindex", each === name ? "0" : "-1"));
  }

  walk(event, side, layer, index) {
    const { layers, heads } = this.setup.models.find((each) => each.side === side);
    const steps = { ArrowUp: [layer + 1, index], ArrowDown: [layer - 1, index], ArrowLeft: [layer, index - 1], ArrowRight: [layer, index + 1], Home: [layer, 0], End: [layer, heads - 1], PageUp: [layers - 1, index], PageDown: [0, index] };
    const name = `L${layer}H${index}`;
    if (event.key === "c" && !event.ctrlKey && !event.metaKey) this.ask({ do: "toggle", side, head: name });
    else if (event.key in steps) this.grids[side].cells[`L${steps[event.key][0]}H${steps[event.key][1]}`]?.focus();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  key(event) {
    if (event.target.matches("input, textarea, select, pre")) return;
    if (event.key === "z" && (event.ctrlKey || event.metaKey) && this.view?.undo) this.ask({ do: "undo" });
    else if (event.key === "Escape") this.tip(null);
    else return;
    event.preventDefault();
  }

  tip(cell, text) {
    const { tip } = this.at;
    tip.hidden = !cell;
    if (!cell) return;
    tip.textContent = text;
    const [box, frame] = [cell.getBoundingClientRect(), this.root.getBoundingClientRect()];
    tip.style.setProperty("left", `${Math.max(4, Math.min(box.left - frame.left + box.width / 2, frame.width - tip.offsetWidth - 4))}px`);
    tip.style.setProperty("top", `${box.bottom - frame.top + 6}px`);
  }

  // ---- one head
  headButton(side, name, more = "") {
    return h("button.head", { type: "button", title: `Look at ${name} of the ${side}`, onclick: (event) => this.choose(side, name, event) }, name, more);
  }

  drawHead(view) {
    const { head, settings } = view;
    if (!head) {
      this.matrix = null;
      fill(this.at.head, h("h3", {}, "Head"), h("p.empty", {}, "Click a head in a map, or walk there with the arrow keys and press Enter: where it looks, what it writes, whom it reads from and feeds. ", h("kbd", {}, "c"), " adds it to the circuit, ", h("kbd", {}, "ctrl z"), " takes that back."));
      return;
    }
    const key = `${head.side} ${head.head} ${view.pair.clean}`;
    if (this.headKey !== key) this.query = null;
    if (this.headKey !== key || !this.at.headTop?.isConnected) {
      for (const name of ["headTop", "facts", "attention", "reads", "feeds"]) this.at[name] = h("div");
      this.at.attention.className = "attention";
      fill(this.at.head, this.at.headTop, this.at.facts, this.at.attention, h("div.neighbours", {}, this.at.reads, this.at.feeds));
      for (const name of ["headTop", "facts", "attention", "reads", "feeds"]) delete this.drawn[name];
      this.matrix = null;
    }
    this.headKey = key;
    this.section("headTop", [key, head.member, view.matches, view.beside], () => {
      const toggle = h("button.primary", { type: "button", "data-do": "toggle", "aria-pressed": String(head.member), onclick: () => this.ask({ do: "toggle", side: head.side, head: head.head }) }, head.member ? "Drop from the circuit" : "Add to the circuit");
      const pin = h("button", { type: "button", "data-do": "beside", title: "Keep this head on this pair beside the next one that you look at", onclick: () => this.ask({ do: "beside", side: head.side, head: head.head }) }, "Hold beside");
      fill(this.at.headTop, h("div.row", {}, h("h3", { "data-in-view": head.head }, `${head.head} of the ${SIDES[head.side]}`), h("span.grow"), pin, toggle), this.walkMatches(view));
    });
    this.section("facts", [key, head.impacts, head.guess, head.score, head.estimated, head.change, head.share, head.partners, settings.metric, settings.position], () => fill(this.at.facts, this.facts(head, view)));
    this.section("attention", [key, head.attention, settings.weighted], () => {
      this.matrix = null;
      fill(this.at.attention, this.attention(head, view));
      if (this.matrix) this.drawMatrix();
    });
    this.section("reads", [key, head.reads, head.guess], () => fill(this.at.reads, this.reads(head)));
    this.section("feeds", [key, head.feeds, head.guess], () => fill(this.at.feeds, this.feeds(head)));
  }

  /** Buttons that walk the matched pairs of teacher and student. */
  walkMatches({ matches }) {
    if (!matches || !this.setup.models.some((each) => each.side === "student")) return [];
    const step = (by, sign, name) => h("button", { type: "button", "aria-label": name, title: name, "data-match": by, onclick: () => this.ask({ do: "match", step: by }) }, sign);
    const where = matches.at === null ? `${matches.count} matched pairs` : `matched pair ${matches.at + 1} of ${matches.count}`;
    return h("div.row.matches", {}, step(-1, "‹", "Previous matched pair"), step(1, "›", "Next matched pair"), h("span.muted", { "data-matched": "" }, `${where} (by ${matches.rule.replaceAll("_", " ")}), the teacher's head here, the student's beside it`));
  }

  facts(head, view) {
    const metric = view.settings.metric.replaceAll("_", " ");
    const guessed = !head.impacts && head.guess?.impacts && !head.guess.impacts.error;
    const impacts = guessed ? Object.entries(head.guess.impacts) : head.impacts && !head.impacts.error ? Object.entries(head.impacts) : [];
    const rows = impacts.map(([kind, value]) => h("li", {}, h("span", {}, `${kind} ablation`), h("b", { "data-impact": kind, "data-guess": guessed || null, title: guessed ? ESTIMATE : null }, guessed ? "≈ " : "", shown(value, { sign: true }))));
    const score = h("li", {}, h("span", {}, "in the map above"), h("b", { "data-score": "", title: head.estimated ? ESTIMATE : null }, head.estimated ? "≈ " : "", shown(head.score, { sign: true })));
    const change = head.change ? [h("h4", {}, "Before and after distillation"), h("ul", { "data-change": "" }, h("li", {}, h("span", {}, "student, before"), h("b", {}, shown(head.change.student, { sign: true }))), h("li", {}, h("span", {}, "student, after"), h("b", {}, shown(head.change.after, { sign: true }))), h("li", {}, h("span", {}, "change"), h("b", {}, head.change.student === null || head.change.after === null ? "–" : shown(head.change.after - head.change.student, { sign: true }))))] : [];
    const { share } = head;
    const partners = head.partners.map((each) => {
      const found = each.nearest?.error ? h("span.error", {}, each.nearest.error) : each.nearest ? each.nearest.map(([name, value]) => [this.headButton(each.side, name), ` ${value.toFixed(2)} `]) : "…";
      const mapped = each.mapped.length ? [" · matched: ", each.mapped.map((name) => this.headButton(each.side, name))] : null;
      return h("li", {}, h("span", {}, `most alike in the ${each.side}`, h("small", { title: "Centred kernel alignment of the heads' outputs on the listed prompts: 1 for the same up to rotation and scale, 0 for unrelated" }, " CKA")), h("span.partners", {}, found, mapped));
    });
    return h(
      "div.facts",
      {},
      h("div", {}, h("h4", {}, `Fall of the ${metric} when ablated`), h("ul", {}, score, impacts.length ? rows : h("li.muted", {}, head.impacts?.error ?? "…")), h("small", {}, guessed ? `${ESTIMATE}; ` : "", `at ${view.settings.position === "all" ? "all tokens" : view.settings.position.replaceAll("_", " ")}; positive: the head helps`), change),
      h(
        "div",
        {},
        h("h4", {}, "Direct share of the logit difference"),
        h("ul", {}, share && !share.error ? [h("li", {}, h("span", {}, `${head.head} writes`), h("b", { "data-share": "" }, shown(share.share, { sign: true }))), h("li", {}, h("span", {}, "of all parts together"), h("span", {}, shown(share.total, { sign: true }))), h("li", {}, h("span", {}, "rank by size"), h("span", {}, `${share.rank} of ${share.heads} heads`))] : h("li.muted", {}, share?.error ?? "…")),
        partners.length ? [h("h4", {}, "Partner"), h("ul", {}, partners)] : null,
      ),
    );
  }

  attention(head, view) {
    const found = head.attention;
    const weighted = h("label.check", {}, h("input", { type: "checkbox", checked: view.settings.weighted, "data-set": "weighted", onchange: (event) => this.ask({ do: "set", weighted: event.target.checked }) }), "weighted by the value's norm");
    const title = h("div.row", {}, h("h4", {}, "Attention"), h("span.grow"), weighted);
    if (!found || found.error) return [title, h("p.muted", {}, found?.error ?? "…")];
    const strip = h("div.text", { role: "listbox", "aria-label": "Attention from the chosen token, on the prompt", "data-strip": "" });
    const caption = h("p.caption", { "aria-live": "polite" });
    const buttons = found.tokens.map((token, index) => {
      const node = h("button.token", { type: "button", role: "option", tabindex: "-1" }, visible(token));
      node.addEventListener("click", () => this.look(index, true));
      node.addEventListener("keydown", (event) => {
        const to = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: found.tokens.length - 1 }[event.key];
        if (to === undefined || !buttons[to]) return;
        this.look(to, true);
        buttons[to].focus();
        event.preventDefault();
      });
      node.addEventListener("pointerenter", () => this.tip(node, `from ${quoted(found.tokens, this.query)}\nto ${quoted(found.tokens, index)}: ${index > this.query ? "later, not seen" : shown(found.weights[this.query][index])}`));
      node.addEventListener("pointerleave", () => this.tip(null));
      return node;
    });
    strip.append(...buttons);
    const canvas = h("canvas.matrix", { role: "img", "aria-label": "Attention of every token (down) on every token before it (across)" });
    this.matrix = { found, buttons, caption, canvas, largest: Math.max(...found.weights.flat()) || 1 };
    canvas.addEventListener("pointermove", (event) => this.overMatrix(event));
    canvas.addEventListener("pointerleave", () => this.tip(null));
    canvas.addEventListener("click", (event) => this.look(this.spot(event)[0], true));
    this.query ??= found.tokens.length - 1;
    this.query = Math.min(this.query, found.tokens.length - 1);
    this.look(this.query, false);
    return [title, caption, strip, h("div.matrixrow", {}, canvas, h("small", {}, `${found.unit}; each row a token that looks, each column one that is looked at; darkest ${shown(this.matrix.largest)}. Click a row or a token to see where it looks.`))];
  }

  /** Shade the prompt by where one token looks. */
  look(query, redraw) {
    const { found, buttons, caption } = this.matrix;
    this.query = query;
    const row = found.weights[query];
    const most = Math.max(...row) || 1;
    buttons.forEach((node, index) => {
      const share = index > query ? 0 : row[index] / most;
      node.style.setProperty("background", mixed(this.colours.wash, share));
      node.style.setProperty("color", share > this.colours.strong ? this.colours.strong_ink : index > query ? this.colours.muted : this.colours.ink);
      node.classList.toggle("query", index === query);
      node.setAttribute("aria-selected", String(index === query));
      node.setAttribute("tabindex", index === query ? "0" : "-1");
      node.dataset.weight = index > query ? "" : row[index];
    });
    const best = row.map((value, index) => [value, index]).sort((a, b) => b[0] - a[0]).slice(0, 3).filter(([value]) => value > 0.01 * most);
    fill(caption, `${quoted(found.tokens, query)} looks at `, best.map(([value, index], place) => [place ? ", " : "", h("b", {}, quoted(found.tokens, index)), ` ${shown(value)}`]));
    if (redraw) this.drawMatrix();
  }

  drawMatrix() {
    const { found, canvas, largest } = this.matrix;
    const n = found.tokens.length;
    const room = Math.min(this.at.head.clientWidth || 320, 320);
    const cell = (this.matrix.cell = Math.max(2, Math.min(16, Math.floor(room / n))));
    const ratio = window.devicePixelRatio || 1;
    canvas.width = canvas.height = Math.round(n * cell * ratio);
    canvas.style.setProperty("width", `${n * cell}px`);
    canvas.style.setProperty("height", `${n * cell}px`);
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.fillStyle = this.colours.background;
    context.fillRect(0, 0, n * cell, n * cell);
    found.weights.forEach((row, query) =>
      row.forEach((value, at) => {
        context.fillStyle = mixed(this.colours.wash, value / largest);
        context.fillRect(at * cell, query * cell, cell - (cell > 5 ? 1 : 0), cell - (cell > 5 ? 1 : 0));
      }),
    );
    context.strokeStyle = this.colours.helps;
    context.lineWidth = 1.5;
    context.strokeRect(0.75, this.query * cell + 0.25, (this.query + 1) * cell - 1.5, Math.max(2, cell - 1));
  }

  spot(event) {
    const { canvas, cell, found } = this.matrix;
    const box = canvas.getBoundingClientRect();
    return [event.clientY - box.top, event.clientX - box.left].map((place) => Math.max(0, Math.min(found.tokens.length - 1, Math.floor(place / cell))));
  }

  overMatrix(event) {
    const [query, at] = this.spot(event);
    const { found, canvas } = this.matrix;
    if (at > query) return this.tip(null);
    this.tip(canvas, `from ${quoted(found.tokens, query)}\nto ${quoted(found.tokens, at)}: ${shown(found.weights[query][at])}`);
    const frame = this.root.getBoundingClientRect();
    this.at.tip.style.setProperty("left", `${Math.max(4, Math.min(event.clientX - frame.left + 12, frame.width - this.at.tip.offsetWidth - 4))}px`);
    this.at.tip.style.setProperty("top", `${event.clientY - frame.top + 14}px`);
  }

  reads(head) {
    const guessed = !head.reads && head.guess?.reads && !head.guess.reads.error;
    const reads = guessed ? head.guess.reads : head.reads;
    const title = h("h4", {}, "Reads from", h("small", {}, guessed ? ` ≈ ${ESTIMATE}` : " path effect through its q, k, v"));
    if (!reads || reads.error) return h("div", {}, title, h("p.muted", {}, reads?.error ?? "…"));
    if (!reads.length) return h("div", {}, title, h("p.muted", {}, /^L0H/.test(head.head) ? "It is in the first layer: no head is below it." : "No head below has an effect through it."));
    const most = Math.max(...reads.map((each) => Math.abs(each.together)));
    const rows = reads.map((each) => h("tr", {}, h("td", {}, this.headButton(head.side, each.head)), h("td.signed", {}, this.signed(each.together, most)), h("td.number", {}, shown(each.together, { sign: true })), ["q", "k", "v"].map((letter) => h("td.small", {}, letter in each ? shown(each[letter], { sign: true }) : "…"))));
    return h("div", {}, title, h("table", {}, h("thead", {}, h("tr", {}, ["head", "", "together", "q", "k", "v"].map((each) => h("th", { title: LETTERS[each] }, each)))), h("tbody", {}, rows)));
  }

  feeds(head) {
    const guessed = !head.feeds && head.guess?.feeds && !head.guess.feeds.error;
    const feeds = guessed ? head.guess.feeds : head.feeds;
    const title = h("h4", {}, "Feeds", h("small", {}, guessed ? ` ≈ ${ESTIMATE}` : " path effect on the inputs above"));
    if (!feeds || feeds.error) return h("div", {}, title, h("p.muted", {}, feeds?.error ?? "…"));
    const all = [["logits", feeds.logits], ...feeds.heads];
    const most = Math.max(...all.map(([, value]) => Math.abs(value ?? 0))) || 1;
    const rows = all.map(([name, value]) => h("tr", {}, h("td", {}, name === "logits" ? "logits" : this.receiver(head.side, name)), h("td.signed", {}, this.signed(value ?? 0, most)), h("td.number", {}, shown(value, { sign: true }))));
    return h("div", {}, title, h("table", {}, h("thead", {}, h("tr", {}, ["into", "", "effect"].map((each) => h("th", { title: LETTERS[each] }, each)))), h("tbody", {}, rows)));
  }

  /** `L5H4.k` is the whole key-value group's where several heads share it. */
  receiver(side, name) {
    const [head, letter] = name.split(".");
    const { heads, kv_heads } = this.setup.models.find((each) => each.side === side);
    const group = letter === "q" ? 1 : heads / kv_heads;
    const last = Number(head.split("H")[1]) + group - 1;
    return [h("abbr", { title: LETTERS[letter] }, letter), " of ", this.headButton(side, head), group > 1 ? h("small", { title: `Heads ${head} to H${last} share this ${letter} (grouped-query attention)` }, `–H${last}`) : null];
  }

  /** A bar to the right (helps) or left; none for what is rounding. */
  signed(value, most) {
    if (Math.abs(value) < this.setup.noise) return null;
    return h(value < 0 ? "span.signedbar.hurts" : "span.signedbar.helps", { css: { "--w": `${(50 * Math.abs(value)) / most}%` } });
  }

  drawShares({ attribution, selected }) {
    const title = h("h3", {}, `Direct logit attribution of the ${SIDES[selected.side]}`);
    if (!attribution || attribution.error) return fill(this.at.shares, title, h("p.muted", {}, attribution?.error ?? "…"));
    const most = Math.max(...attribution.parts.map(([, value]) => Math.abs(value))) || 1;
    const rows = attribution.parts.map(([name, value]) => h(name === selected.head ? "tr.here" : "tr", {}, h("td", {}, /^L\d+H\d+$/.test(name) ? this.headButton(selected.side, name) : h("span.part", { title: /^M\d+$/.test(name) ? `The MLP of layer ${name.slice(1)}` : name }, name)), h("td.signed.wide", {}, this.signed(value, most)), h("td.number", {}, shown(value, { sign: true }))));
    fill(this.at.shares, title, h("p.explain", {}, `The ${rows.length} largest of ${attribution.count} parts (heads, MLPs, embedding, biases); all sum to the logit difference, ${shown(attribution.total, { sign: true })}. Positive pushes towards the answer; the final norm's scale is frozen at this prompt's.`), h("table", {}, h("tbody", {}, rows)));
  }

  // ---- circuits
  drawCircuits(view) {
    const { settings, selected } = view;
    this.at.blocks ??= h("div");
    this.section("outside", [settings.outside, selected.side], () => {
      const outside = h("label", {}, "heads outside take ", h("select", { "data-set": "outside", onchange: (event) => this.ask({ do: "set", outside: event.target.value }) }, this.setup.outsides.map((each) => h("option", { value: each.value, selected: each.value === settings.outside }, each.title))));
      const file = h("input", { type: "text", name: "file", value: this.file ?? "circuit.json", "aria-label": "File name", oninput: (event) => (this.file = event.target.value) });
      const save = h("form.row", { onsubmit: (event) => (event.preventDefault(), this.ask((this.saving = { do: "save", side: this.view.selected.side, name: file.value }))) }, file, h("button", { type: "submit", "data-do": "save" }, `Save the ${selected.side}'s circuit`));
      const compare = h("button", { type: "button", "data-do": "compare", onclick: () => this.ask({ do: "compare" }) }, "Against random circuits");
      this.at.load = h("div");
      delete this.drawn.load;
      fill(this.at.circuits, h("div.row.controls", {}, outside, this.at.load), this.at.blocks, h("div.row.tail", {}, save, h("span.grow"), compare));
    });
    this.section("load", [view.sources, selected.side], () => {
      const choice = h("select", { "data-do": "source" }, view.sources[selected.side].map((name) => h("option", { value: name }, name)));
      fill(this.at.load, h("form.row", { onsubmit: (event) => (event.preventDefault(), this.ask({ do: "load", side: selected.side, source: choice.value })) }, h("label", {}, "circuit or ranking ", choice), h("button", { type: "submit", "data-do": "load", title: "Take it as the circuit; where a search has left its ranking, step along it" }, `Load for the ${selected.side}`)));
    });
    for (const [side, circuit] of Object.entries(view.circuits)) {
      const block = (this.at[`block ${side}`] ??= h("div.circuit", { "data-circuit": side }));
      if (block.parentNode !== this.at.blocks) this.at.blocks.append(block);
      const rows = (block.rows ??= {});
      for (const name of ["title", "path", "groups", "meters"]) if (!rows[name]) block.append((rows[name] = h("div")));
      this.section(`title ${side}`, [circuit.heads, circuit.method], () => fill(rows.title, this.circuitTitle(side, circuit)));
      this.section(`path ${side}`, circuit.path, () => this.drawPath(rows.path, side, circuit.path));
      this.section(`groups ${side}`, [circuit.groups, view.settings.metric, view.settings.outside], () => this.drawGroups(rows.groups, side, circuit, view));
      fill(rows.meters, this.meters(side, circuit, circuit.on_prompts, view));
    }
  }

  // ---- stepping along a ranking
  drawPath(node, side, path) {
    if (!path) return fill(node);
    if (!path.heads) return fill(node, h("p.muted", {}, `${path.source} has no ranking of a search beside it.`));
    if (node.dataset.source !== path.source || !node.firstChild?.matches?.(".steps")) {
      node.dataset.source = path.source;
      const slider = h("input", { type: "range", min: 0, max: path.heads, step: 1, "data-step": side, "aria-label": `Heads left along ${path.source}` });
      slider.addEventListener("input", () => {
        clearTimeout(this.stepping);
        node.said.textContent = `${slider.value} of ${path.heads} heads …`;
        this.stepping = setTimeout(() => this.ask({ do: "step", side, size: Number(slider.value) }), 90);
      });
      Object.assign(node, { slider, said: h("small", { "aria-live": "polite", "data-left": side }), chart: h("canvas.pathchart", { role: "img" }), legend: h("small") });
      fill(node, h("div.steps", {}, h("h5", {}, `along ${path.source}: `, node.said), slider, node.chart, node.legend));
    }
    if (path.size !== null && document.activeElement !== node.slider) node.slider.value = path.size;
    node.said.textContent = path.size === null ? "changed by hand: move the slider to step again" : `${path.size} of ${path.heads} heads left${path.next ? `, next to go ${path.next}` : ""}`;
    const here = Object.fromEntries(path.here);
    node.legend.textContent = `faithfulness by heads left: dots on this page's test prompts (${path.here.length} sizes)${path.search.length ? `, line as the search saw it on its own ${path.search_prompts} prompts` : ""}${path.chosen ? `; dashed: its choice, ${path.chosen}` : ""}`;
    node.chart.setAttribute("aria-label", `Faithfulness along the path: ${path.here.map(([size, value]) => `${size} heads ${shown(value)}`).join(", ")}`);
    node.chart.dataset.here = JSON.stringify(here);
    this.chart(node.chart, path);
  }

  chart(canvas, path) {
    const [width, height, left, bottom] = [Math.max(220, Math.min(460, this.at.blocks.clientWidth - 10)), 110, 30, 16];
    const ratio = window.devicePixelRatio || 1;
    Object.assign(canvas, { width: width * ratio, height: height * ratio });
    canvas.style.setProperty("width", `${width}px`);
    canvas.style.setProperty("height", `${height}px`);
    const draw = canvas.getContext("2d");
    draw.scale(ratio, ratio);
    const most = Math.max(1, ...[...path.here, ...path.search].map(([, value]) => value ?? 0));
    const at = (size, value) => [left + ((width - left - 8) * size) / path.heads, 6 + (height - bottom - 10) * (1 - value / most)];
    Object.assign(draw, { font: `10px ${this.colours.font}`, fillStyle: this.colours.muted, strokeStyle: this.colours.grid, lineWidth: 1 });
    for (const value of [0, 0.5, 1]) {
      const [x, y] = at(0, value);
      draw.fillText(shown(value), 4, y + 3);
      draw.strokeRect(x, y, width - left - 8, 0);
    }
    for (const size of [0, Math.round(path.heads / 2), path.heads]) draw.fillText(String(size), at(size, 0)[0] - 5, height - 3);
    const stroke = (points, colour, dash = []) => {
      draw.setLineDash(dash);
      Object.assign(draw, { strokeStyle: colour, lineWidth: 1.5 });
      draw.beginPath();
      points.forEach(([x, y], place) => (place ? draw.lineTo(x, y) : draw.moveTo(x, y)));
      draw.stroke();
      draw.setLineDash([]);
    };
    stroke(path.search.filter(([, value]) => value !== null).map(([size, value]) => at(size, value)), this.colours.muted);
    if (path.chosen) stroke([at(path.chosen, 0), at(path.chosen, most)], this.colours.muted, [3, 3]);
    for (const [size, value] of path.here) {
      if (value === null) continue;
      draw.fillStyle = this.colours.categories[0];
      draw.beginPath();
      draw.arc(...at(size, Math.max(0, value)), size === path.size ? 5 : 2.5, 0, 7);
      draw.fill();
    }
    if (path.size !== null) stroke([at(path.size, 0), at(path.size, most)], this.colours.ink);
  }

  // ---- groups
  drawGroups(node, side, circuit, view) {
    if (!circuit.heads.length) return fill(node);
    const metric = view.settings.metric.replaceAll("_", " ");
    const rows = circuit.groups.map(({ role, heads, effect }) => {
      const numbers = effect?.error ? [h("td", { colspan: 2 }, effect.error)] : [h("td.number", { "data-joint": role }, shown(effect?.joint, { sign: true })), h("td.small", {}, shown(effect?.singly, { sign: true }))];
      return h("tr", {}, h("td", {}, role), h("td.wrap", {}, heads.map((head) => this.headButton(side, head))), numbers);
    });
    const table = h("table.groups", {}, h("thead", {}, h("tr", {}, h("th", {}, "role"), h("th", {}, "heads"), h("th", { title: `Fall of the ${metric} on the test prompts when all of them are ablated at once` }, "together"), h("th", { title: "The sum of the falls when each is ablated alone; where it is less than together, they stand in for each other" }, "sum of single"))), h("tbody", {}, rows));
    const chosen = (this.grouping ??= {});
    const boxes = circuit.heads.map(({ head }) => h("label.check", {}, h("input", { type: "checkbox", checked: Boolean(chosen[`${side} ${head}`]), value: head, onchange: (event) => (chosen[`${side} ${head}`] = event.target.checked) }), head));
    const name = h("input", { type: "text", name: "role", maxlength: 40, placeholder: "e.g. value fetcher", "aria-label": "Name of the group", list: `wbx-roles-${side}` });
    const send = (event) => {
      event.preventDefault();
      const heads = circuit.heads.map((each) => each.head).filter((head) => chosen[`${side} ${head}`]);
      this.grouping = {};
      this.ask({ do: "role", side, heads, role: name.value.trim() });
    };
    const form = h("form.grouping", { onsubmit: send }, h("div.row", {}, boxes), h("div.row", {}, name, h("datalist", { id: `wbx-roles-${side}` }, circuit.groups.map(({ role }) => h("option", { value: role }))), h("button", { type: "submit", "data-do": "role" }, "Group the ticked heads")));
    const open = (this.groupsOpen ??= {});
    fill(node, table, h("details", { open: open[side], ontoggle: (event) => (open[side] = event.target.open) }, h("summary", {}, "Group heads by hand"), form));
  }

  circuitTitle(side, circuit) {
    const [layers, heads] = circuit.shape;
    const chips = circuit.heads.map((each) => h("span.chip", { title: each.role }, this.headButton(side, each.head), h("button", { type: "button", "aria-label": `Drop ${each.head}`, title: `Drop ${each.head} from the circuit`, onclick: () => this.ask({ do: "toggle", side, head: each.head }) }, "×")));
    const clear = circuit.heads.length ? h("button.quiet", { type: "button", onclick: () => this.ask({ do: "clear", side }) }, "empty it") : null;
    const title = h("h4", {}, `${SIDES[side]}: ${circuit.heads.length} of ${layers * heads} heads `, h("small", {}, circuit.method), " ", clear);
    return [title, h("div.chips", {}, chips.length ? chips : h("span.muted", {}, "no head yet: everything is ablated"))];
  }

  meters(side, circuit, report, view) {
    if (!report) return h("p.muted", {}, "evaluating …");
    if (report.error) return h("p.error", {}, report.error);
    const now = { faithfulness: report.faithfulness, accuracy: report.circuit_accuracy, recovered: report.logit_difference_recovered };
    const key = JSON.stringify([circuit.heads, view.settings.outside]);
    const kept = (this.before[side] ??= { key, now, then: null });
    if (kept.key !== key) this.before[side] = { key, now, then: kept.now };
    const then = this.before[side].then ?? {};
    const { random } = circuit;
    const versus = random && !random.error ? { accuracy: random.random_circuit_accuracy, difference: random.logit_differences.random } : null;
    const full = report.logit_differences;
    const lines = [
      this.meter("faithfulness", "accuracy alone / accuracy of the model", now.faithfulness, then.faithfulness, now.faithfulness, shown(now.faithfulness), versus && report.full_accuracy ? versus.accuracy / report.full_accuracy : null),
      this.meter("accuracy alone", `of ${report.prompts} test prompts; the model ${percent(report.full_accuracy)}; 95 % interval ${percent(report.circuit_interval[0])} to ${percent(report.circuit_interval[1])}`, now.accuracy, then.accuracy, now.accuracy, percent(now.accuracy), versus?.accuracy ?? null),
      this.meter("logit difference recovered", `alone ${shown(full.circuit)}, the model ${shown(full.full)}, nothing ${shown(full.empty)}`, now.recovered, then.recovered, now.recovered, percent(now.recovered), versus ? (versus.difference - full.empty) / (full.full - full.empty) : null),
    ];
    const pair = circuit.on_pair;
    const one = pair && !pair.error ? `On this pair: logit difference ${shown(pair.logit_differences.circuit)} alone, ${shown(pair.logit_differences.full)} the model, ${shown(pair.logit_differences.empty)} nothing.` : (pair?.error ?? "");
    const other = view.settings.compared && side === view.selected.side && !random ? "random circuits …" : random?.error ? random.error : versus ? `Mark: ${random.random_circuits} random circuits of ${random.heads} heads, mean (accuracy ${percent(random.random_circuit_range[0])} to ${percent(random.random_circuit_range[1])}).` : "";
    return h("div.meters", {}, lines, h("small", { "data-pair": "" }, one, other && h("br"), other));
  }

  meter(name, title, value, before, share, text, mark) {
    const moved = before !== undefined && before !== null && value !== null && Math.abs(value - before) > 1e-4 ? value - before : 0;
    const delta = moved ? h("span", { class: moved > 0 ? "delta up" : "delta down", title: "Change since the circuit's last change" }, `${moved > 0 ? "▲" : "▼"} ${shown(Math.abs(moved))}`) : null;
    return h("div.meter", { title }, h("span.name", {}, name), h("span.track", {}, h("span.value", { css: { "--w": `${Math.max(0, Math.min(1, share ?? 0)) * 100}%` } }), mark === null ? null : h("span.mark", { title: "Mean of random circuits of as many heads", css: { left: `${Math.max(0, Math.min(1, mark)) * 100}%` } })), h("b", { "data-meter": name }, text), delta);
  }

  // ---- all heads of a layer, small
  drawThumbnails({ thumbnails, selected }) {
    const { layers } = this.setup.models.find((each) => each.side === selected.side);
    const { layer, follows, heads, pictures } = thumbnails;
    const options = [h("option", { value: "", selected: follows }, `of the head in view (${layer})`), Array.from({ length: layers }, (_, each) => h("option", { value: each, selected: !follows && each === layer }, `layer ${each}`))];
    const choice = h("select", { "data-set": "layer", "aria-label": "Layer", onchange: (event) => this.ask({ do: "set", layer: event.target.value === "" ? null : Number(event.target.value) }) }, options);
    const title = h("div.row", {}, h("h3", {}, `Attention of layer ${layer}, ${SIDES[selected.side]}`), h("span.grow"), choice);
    if (!pictures || pictures.error) return fill(this.at.thumbnails, title, h("p.muted", {}, pictures?.error ?? "…"));
    const tiles = heads.map(({ head, score }) => {
      const canvas = h("canvas", { width: pictures.cells, height: pictures.cells, "aria-hidden": "true" });
      this.small(canvas, pictures, Number(head.split("H")[1]));
      const chosen = head === selected.head;
      const words = `${head}: effect ${shown(score, { sign: true })}`;
      return h("button.tile", { type: "button", "data-tile": head, "aria-pressed": String(chosen), "aria-label": words, title: words, onclick: (event) => this.choose(selected.side, head, event) }, canvas, h("span", {}, h("b", {}, head), ` ${shown(score, { sign: true })}`));
    });
    const again = document.activeElement?.dataset?.tile;
    fill(this.at.thumbnails, title, h("div.tiles", {}, tiles), h("small", {}, "The largest effect in the map first; down: the token that looks, across: the one looked at; each on a scale of its own."));
    if (again) this.at.thumbnails.querySelector(`[data-tile="${again}"]`)?.focus();
  }

  small(canvas, { cells, heads }, index) {
    const bytes = Uint8Array.from(atob(heads[index]), (each) => each.charCodeAt(0));
    const draw = canvas.getContext("2d");
    const image = draw.createImageData(cells, cells);
    const wash = Array.from({ length: 256 }, (_, step) => mixed(this.colours.wash, step / 255).match(/\d+/g).map(Number));
    bytes.forEach((step, place) => image.data.set([...wash[step], 255], 4 * place));
    draw.putImageData(image, 0, 0);
  }

  // ---- two heads, or two pairs, side by side
  drawCompare(view) {
    const { beside, head, settings } = view;
    this.at.compare.hidden = !beside;
    if (!beside) return fill(this.at.compare);
    const close = h("button", { type: "button", "data-do": "apart", onclick: () => this.ask({ do: "beside" }) }, "Close");
    const first = head && { ...head, clean: view.pair.clean, picked: view.pair.picked };
    const two = [first, beside];
    const name = (each) => (each ? `${each.head} of the ${SIDES[each.side]}` : "no head in view");
    const pair = (each) => (!each ? "" : each.picked === null ? "your own pair" : `pair ${each.picked + 1}`);
    const kinds = Object.keys(beside.impacts && !beside.impacts.error ? beside.impacts : {});
    const numbers = [
      ...(beside.same_pair || settings.average ? [["in the map", (each) => each.score]] : []),
      ...kinds.map((kind) => [`${kind} ablation`, (each) => each.impacts?.[kind]]),
      ["direct share", (each) => each.share?.share],
    ].map(([title, read]) => {
      const [a, b] = two.map((each) => (each ? (read(each) ?? null) : null));
      return h("tr", {}, h("td", {}, title), [a, b, a === null || b === null ? null : a - b].map((value) => h("td.number", {}, shown(value, { sign: true }))));
    });
    const table = h("table.versus", {}, h("thead", {}, h("tr", {}, ["", ...two.map((each) => (each ? `${each.side} ${each.head}, ${pair(each)}` : "–")), "difference"].map((each) => h("th", {}, each)))), h("tbody", {}, numbers));
    const halves = two.map((each, place) => {
      const title = h("h4", { "data-half": place }, name(each), h("small", {}, ` on ${pair(each)}${place ? ", held" : ", in view"}`));
      if (!each?.attention || each.attention.error) return h("div", {}, title, h("p.muted", {}, each?.attention?.error ?? "…"));
      const canvas = h("canvas.matrix", { role: "img", "aria-label": `Attention of ${name(each)} on ${pair(each)}` });
      this.plainMatrix(canvas, each.attention);
      const last = each.attention.weights.at(-1);
      const best = last.map((value, index) => [value, index]).sort((a, b) => b[0] - a[0]).slice(0, 3);
      return h("div", {}, title, canvas, h("p.caption", {}, "the last token looks at ", best.map(([value, index], at) => [at ? ", " : "", h("b", {}, quoted(each.attention.tokens, index)), ` ${shown(value)}`])));
    });
    fill(this.at.compare, h("div.row", {}, h("h3", {}, "Side by side"), h("span.grow"), close), h("div.halves", {}, halves, table));
  }

  plainMatrix(canvas, { weights, tokens }) {
    const n = tokens.length;
    const cell = Math.max(2, Math.min(12, Math.floor(300 / n)));
    const largest = Math.max(...weights.flat()) || 1;
    Object.assign(canvas, { width: n * cell, height: n * cell });
    const draw = canvas.getContext("2d");
    draw.fillStyle = this.colours.background;
    draw.fillRect(0, 0, n * cell, n * cell);
    weights.forEach((row, query) => row.forEach((value, at) => ((draw.fillStyle = mixed(this.colours.wash, value / largest)), draw.fillRect(at * cell, query * cell, cell, cell))));
  }

  // ---- what goes on
  drawStatus({ pending, stopped }) {
    const [now] = pending;
    if (now) {
      const more = pending.length > 1 ? ` and ${pending.length - 1} more` : "";
      const stop = h("button", { type: "button", "data-do": "stop", onclick: () => this.ask({ do: "stop" }) }, "Stop");
      fill(this.at.status, h("progress", { max: 1, value: now.share, "aria-label": now.label }), h("span", {}, `${now.label}${now.share ? ` ${percent(now.share)}` : ""}${more}`), stop);
    } else if (stopped.length) {
      fill(this.at.status, h("span", {}, `stopped: ${stopped.join(", ")}`), h("button", { type: "button", "data-do": "resume", onclick: () => this.ask({ do: "resume" }) }, "Go on"));
    } else fill(this.at.status);
  }
}

/** What a letter or a heading of a table stands for, said on hover. */
const LETTERS = {
  q: "query: what the head looks for",
  k: "key: what a token offers to be found by",
  v: "value: what the head reads of the tokens that it looks at",
  head: "L5H3: layer 5, head 3, both from 0",
  together: "The path effect through q, k and v at once; it need not be their sum",
  into: "The input of a head above (q, k or v), or the logits",
  effect: "The fall of the metric when this path alone carries the corrupt prompt's output; no bar: below 0.0001, rounding",
};
const ESTIMATE = "estimated by attribution; the exact value follows";
const shownEnd = (value) => shown(value, { sign: true });
const initials = (role) => role.split("+").map((part) => part[0]).join("").slice(0, 2);
const quoted = (tokens, index) => `“${visible(tokens[index])}” (${index})`;
const shortName = (name) => name.split("/").slice(-2).join("/");

function render({ model, el }) {
  const page = new Page(model, el);
  return () => page.close();
}

export default { render };
