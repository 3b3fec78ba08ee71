// Draws each <div class=space>: voxels and boxes side by side, turned together. Frame base_link: x forward, y left, z up.
// A moment is a list of panels {title, grid, voxels, boxes}; `div.showMoment(index)` shows one. Needs WebGL 2, no network.
"use strict";
(() => {
  const CUBE_VERTEX = `#version 300 es
in vec3 corner; in vec3 normal; in vec2 face; in vec3 cell; in vec3 colour;
uniform mat4 ego2clip; uniform vec3 lo, pitch; uniform float layers;
out vec3 tint; out vec2 place;
void main() {
  gl_Position = ego2clip * vec4(lo + (cell + corner) * pitch, 1.0);
  float light = normal.z > 0.5 ? 1.0 : normal.z < -0.5 ? 0.5 : 0.78 + 0.13 * dot(normal.xy, vec2(-0.5, 0.9));
  tint = colour * light * (0.78 + 0.22 * sqrt((cell.z + 1.0) / layers));
  place = face;
}`;
  const CUBE_FRAGMENT = `#version 300 es
precision mediump float;
in vec3 tint; in vec2 place; out vec4 pixel;
void main() {
  vec2 edge = min(place, 1.0 - place) / max(fwidth(place), 0.001);
  float inner = clamp(min(edge.x, edge.y), 0.0, 1.0), fine = clamp(max(fwidth(place).x, fwidth(place).y) * 4.0, 0.0, 1.0);
  pixel = vec4(tint * mix(0.8 + 0.2 * inner, 0.97, fine), 1.0);
}`;
  const LINE_VERTEX = `#version 300 es
in vec2 side; in vec3 start; in vec3 end; in vec4 colour;
uniform mat4 ego2clip; uniform vec2 size; uniform float width;
out vec4 tint;
void main() {
  vec4 a = ego2clip * vec4(start, 1.0), b = ego2clip * vec4(end, 1.0);
  const float near = 0.2;
  if (a.w < near) a = mix(a, b, clamp((near - a.w) / (b.w - a.w), 0.0, 1.0));
  if (b.w < near) b = mix(b, a, clamp((near - b.w) / (a.w - b.w), 0.0, 1.0));
  vec2 along = normalize((b.xy / b.w - a.xy / a.w) * size + vec2(1e-5));
  vec4 at = side.x < 0.5 ? a : b;
  at.xy += vec2(-along.y, along.x) * side.y * width / size * at.w;
  gl_Position = at; tint = colour;
}`;
  const LINE_FRAGMENT = `#version 300 es
precision mediump float;
in vec4 tint; out vec4 pixel;
void main() { pixel = vec4(tint.rgb * tint.a, tint.a); }`;
  const EDGES = [[0, 1], [1, 2], [2, 3], [3, 0], [4, 5], [5, 6], [6, 7], [7, 4], [0, 4], [1, 5], [2, 6], [3, 7]];
  const EGO = [1.45, 0, 0.85, 4.6, 1.9, 1.7, 0];
  const VIEWS = { "From behind": [0.25, 0.62, 58], "From above": [0, 1.55, 105], "From the left": [-1.3, 0.5, 58] };

  function cube() {
    const rows = [];
    for (let axis = 0; axis < 3; axis++) for (const sign of [1, -1]) {
      const u = (axis + 1) % 3, v = (axis + 2) % 3;
      const square = sign > 0 ? [[0, 0], [1, 0], [1, 1], [0, 0], [1, 1], [0, 1]] : [[0, 0], [1, 1], [1, 0], [0, 0], [0, 1], [1, 1]];
      for (const [a, b] of square) {
        const corner = [0, 0, 0], normal = [0, 0, 0];
        corner[axis] = sign > 0 ? 1 : 0; corner[u] = a; corner[v] = b; normal[axis] = sign;
        rows.push(...corner, ...normal, a, b);
      }
    }
    return new Float32Array(rows);
  }

  async function unpackVoxels(panel) {
    const raw = Uint8Array.from(atob(panel.voxels), c => c.charCodeAt(0));
    const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("deflate"));
    const bytes = await new Response(stream).arrayBuffer();
    const wide = Math.max(...panel.grid.shape) > 256, size = wide ? 2 : 1;
    const count = bytes.byteLength / (3 * size + 1), Kind = wide ? Uint16Array : Uint8Array;
    const [x, y, z] = [0, 1, 2].map(axis => new Kind(bytes, axis * count * size, count));
    return { x, y, z, label: new Uint8Array(bytes, 3 * count * size, count), count };
  }

  // Voxels whose class is shown and that have a free or hidden neighbour, as instances: cell and colour.
  function instances(panel, voxels, data, state) {
    const [nx, ny, nz] = panel.grid.shape, solid = new Uint8Array(nx * ny * nz);
    const at = (x, y, z) => (x * ny + y) * nz + z;
    const shown = i => {
      const label = voxels.label[i];
      return !state.hidden.has(label & 127) && (!state.knownOnly || !panel.hasKnown || label & 128);
    };
    for (let i = 0; i < voxels.count; i++) if (shown(i)) solid[at(voxels.x[i], voxels.y[i], voxels.z[i])] = 1;
    const covered = (x, y, z) =>
      x > 0 && y > 0 && x < nx - 1 && y < ny - 1 && z < nz - 1 && solid[at(x - 1, y, z)] && solid[at(x + 1, y, z)] &&
      solid[at(x, y - 1, z)] && solid[at(x, y + 1, z)] && (z === 0 || solid[at(x, y, z - 1)]) && solid[at(x, y, z + 1)];
    const rows = new Float32Array(6 * voxels.count);
    let used = 0;
    for (let i = 0; i < voxels.count; i++) {
      const x = voxels.x[i], y = voxels.y[i], z = voxels.z[i];
      if (!shown(i) || covered(x, y, z)) continue;
      const rgb = panel.heights ? panel.heights[z] : data.colours[voxels.label[i] & 127];
      rows.set([x, y, z, rgb[0] / 255, rgb[1] / 255, rgb[2] / 255], 6 * used++);
    }
    return rows.subarray(0, 6 * used);
  }

  function boxLines([x, y, z, l, w, h, yaw], colour, out) {
    const c = Math.cos(yaw), s = Math.sin(yaw), corners = [];
    for (const dz of [-0.5, 0.5]) for (const [dx, dy] of [[0.5, 0.5], [0.5, -0.5], [-0.5, -0.5], [-0.5, 0.5]])
      corners.push([x + c * dx * l - s * dy * w, y + s * dx * l + c * dy * w, z + dz * h]);
    for (const [a, b] of EDGES) out.push(...corners[a], ...corners[b], ...colour);
    const middle = [x, y, z - h / 2], front = [x + c * l / 2, y + s * l / 2, z - h / 2];  // where it faces
    out.push(...middle, ...front, ...colour);
  }

  function groundLines(reach, colour, out) {
    for (let d = -reach; d <= reach; d += 10) {
      out.push(d, -reach, 0, d, reach, 0, ...colour, -reach, d, 0, reach, d, 0, ...colour);
    }
  }

  function multiply(a, b) {  // column-major 4x4
    const out = new Float32Array(16);
    for (let c = 0; c < 4; c++) for (let r = 0; r < 4; r++)
      for (let k = 0; k < 4; k++) out[4 * c + r] += a[4 * k + r] * b[4 * c + k];
    return out;
  }

  function ego2clip(view, aspect) {
    const [yaw, pitch, distance] = view.place, t = view.target;
    const forward = [Math.cos(pitch) * Math.cos(yaw), Math.cos(pitch) * Math.sin(yaw), -Math.sin(pitch)];
    const right = [Math.sin(yaw), -Math.cos(yaw), 0];  // y is left
    const up = [right[1] * forward[2] - right[2] * forward[1], right[2] * forward[0] - right[0] * forward[2],
      right[0] * forward[1] - right[1] * forward[0]];
    const eye = t.map((v, i) => v - distance * forward[i]);
    const dot = a => -(a[0] * eye[0] + a[1] * eye[1] + a[2] * eye[2]);
    const look = [right[0], up[0], -forward[0], 0, right[1], up[1], -forward[1], 0, right[2], up[2], -forward[2], 0,
      dot(right), dot(up), -dot(forward), 1];
    const f = 1 / Math.tan(0.35), near = 0.5, far = 400;
    const lens = [f / Math.max(1, aspect), 0, 0, 0, 0, f * Math.min(1, aspect), 0, 0, 0, 0, (far + near) / (near - far), -1,
      0, 0, 2 * far * near / (near - far), 0];
    return multiply(lens, look);
  }

  function program(gl, vertex, fragment) {
    const made = gl.createProgram();
    for (const [kind, text] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, text); gl.compileShader(shader);
      if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader));
      gl.attachShader(made, shader);
    }
    gl.linkProgram(made);
    if (!gl.getProgramParameter(made, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(made));
    return made;
  }

  // One vertex array of a shape that is repeated: `parts` name attributes, their sizes, and whether they are per instance.
  function shape(gl, made, layouts) {
    const array = gl.createVertexArray(), buffers = [];
    gl.bindVertexArray(array);
    for (const { parts, each } of layouts) {
      const buffer = gl.createBuffer(), stride = 4 * parts.reduce((sum, [, n]) => sum + n, 0);
      gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
      let offset = 0;
      for (const [name, n] of parts) {
        const place = gl.getAttribLocation(made, name);
        gl.enableVertexAttribArray(place);
        gl.vertexAttribPointer(place, n, gl.FLOAT, false, stride, offset);
        gl.vertexAttribDivisor(place, each ? 1 : 0);
        offset += 4 * n;
      }
      buffers.push(buffer);
    }
    return { array, buffers };
  }

  function fill(gl, buffer, values) {
    gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
    gl.bufferData(gl.ARRAY_BUFFER, values, gl.DYNAMIC_DRAW);
  }

  function renderer(canvas) {
    const gl = canvas.getContext("webgl2", { antialias: true, alpha: false });
    if (!gl) return null;
    const cubes = program(gl, CUBE_VERTEX, CUBE_FRAGMENT), lines = program(gl, LINE_VERTEX, LINE_FRAGMENT);
    const cubeLayout = [{ parts: [["corner", 3], ["normal", 3], ["face", 2]] }, { parts: [["cell", 3], ["colour", 3]], each: true }];
    const lineLayout = [{ parts: [["side", 2]] }, { parts: [["start", 3], ["end", 3], ["colour", 4]], each: true }];
    const make = () => {
      const made = { cubes: shape(gl, cubes, cubeLayout), lines: shape(gl, lines, lineLayout), voxels: 0, edges: 0 };
      fill(gl, made.cubes.buffers[0], cube());
      fill(gl, made.lines.buffers[0], new Float32Array([0, -1, 0, 1, 1, -1, 1, -1, 0, 1, 1, 1]));
      return made;
    };
    const set = (made, grid, voxels, edges) => {
      Object.assign(made, { grid, voxels: voxels.length / 6, edges: edges.length / 10 });
      fill(gl, made.cubes.buffers[1], voxels);
      fill(gl, made.lines.buffers[1], new Float32Array(edges));
    };
    const draw = (panels, view, paper) => {
      const ratio = window.devicePixelRatio || 1, width = Math.round(canvas.clientWidth * ratio);
      const height = Math.round(canvas.clientHeight * ratio);
      if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
      gl.enable(gl.DEPTH_TEST); gl.enable(gl.CULL_FACE); gl.enable(gl.BLEND); gl.enable(gl.SCISSOR_TEST);
      gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA); gl.clearColor(...paper, 1);
      panels.forEach((panel, index) => {
        const left = Math.round(index * width / panels.length), right = Math.round((index + 1) * width / panels.length);
        gl.viewport(left, 0, right - left, height); gl.scissor(left, 0, right - left, height);
        gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
        const matrix = ego2clip(view, (right - left) / height);
        if (panel.voxels) {
          gl.useProgram(cubes);
          const place = name => gl.getUniformLocation(cubes, name);
          gl.uniformMatrix4fv(place("ego2clip"), false, matrix);
          gl.uniform3fv(place("lo"), panel.grid.lo); gl.uniform3fv(place("pitch"), panel.grid.pitch);
          gl.uniform1f(place("layers"), panel.grid.shape[2]);
          gl.bindVertexArray(panel.cubes.array);
          gl.drawArraysInstanced(gl.TRIANGLES, 0, 36, panel.voxels);
        }
        gl.useProgram(lines); gl.disable(gl.CULL_FACE);
        gl.uniformMatrix4fv(gl.getUniformLocation(lines, "ego2clip"), false, matrix);
        gl.uniform2f(gl.getUniformLocation(lines, "size"), (right - left) / ratio, height / ratio);
        gl.uniform1f(gl.getUniformLocation(lines, "width"), 1.6);
        gl.bindVertexArray(panel.lines.array);
        gl.drawArraysInstanced(gl.TRIANGLES, 0, 6, panel.edges);
        gl.enable(gl.CULL_FACE);
      });
    };
    return { make, set, draw };
  }

  function element(parent, name, text, className) {
    const made = document.createElement(name);
    if (text) made.textContent = text;
    if (className) made.className = className;
    parent.append(made);
    return made;
  }

  function addToggle(parent, text, pressed, change, colour) {
    const button = element(parent, "button", "", "chip");
    button.type = "button"; button.ariaPressed = String(pressed);
    if (colour) element(button, "i").style.background = `rgb(${colour.join()})`;
    button.append(text);
    button.onclick = () => { button.ariaPressed = String(button.ariaPressed !== "true"); change(button.ariaPressed === "true"); };
    return button;
  }

  function addPointer(canvas, view, paint) {
    const fingers = new Map();
    const spread = () => { const [a, b] = [...fingers.values()]; return Math.hypot(a.x - b.x, a.y - b.y); };
    canvas.onpointerdown = e => { canvas.setPointerCapture(e.pointerId); fingers.set(e.pointerId, { x: e.clientX, y: e.clientY }); };
    canvas.onpointerup = canvas.onpointercancel = e => fingers.delete(e.pointerId);
    canvas.onpointermove = e => {
      const last = fingers.get(e.pointerId);
      if (!last) return;
      const dx = e.clientX - last.x, dy = e.clientY - last.y, before = fingers.size > 1 ? spread() : 0;
      fingers.set(e.pointerId, { x: e.clientX, y: e.clientY });
      const [yaw, pitch, distance] = view.place;
      if (fingers.size > 1) view.place[2] = Math.min(250, Math.max(5, distance * before / Math.max(1, spread())));
      else if (e.shiftKey || e.buttons === 2) {
        const step = distance / 700, c = Math.cos(yaw), s = Math.sin(yaw);
        view.target[0] += step * (c * dy - s * dx); view.target[1] += step * (s * dy + c * dx);
      } else {
        view.place[0] = yaw - dx / 150;
        view.place[1] = Math.min(1.57, Math.max(0.03, pitch + dy / 200));
      }
      paint();
    };
    canvas.oncontextmenu = e => e.preventDefault();
    canvas.onwheel = e => {
      e.preventDefault();
      view.place[2] = Math.min(250, Math.max(5, view.place[2] * Math.exp(e.deltaY / 900)));
      paint();
    };
  }

  function start(root) {
    const data = JSON.parse(root.querySelector("script").textContent);
    const stage = element(root, "div", "", "stage"), canvas = element(stage, "canvas");
    const drawer = typeof DecompressionStream === "undefined" ? null : renderer(canvas);
    root.showMoment = async () => {};
    if (!drawer) {
      stage.replaceWith("The scene needs a browser with WebGL 2 and DecompressionStream; this one lacks them.");
      return;
    }
    const state = { hidden: new Set(), knownOnly: data.moments.some(m => m.some(p => p.hasKnown)), boxes: true, over: false };
    const view = { place: [...VIEWS["From behind"]], target: [6, 0, 0] };
    const cache = new Map(), panels = [];
    let moment = 0;
    const dark = matchMedia("(prefers-color-scheme:dark)");
    const paint = () => requestAnimationFrame(() => {
      const paper = dark.matches ? [0.11, 0.13, 0.16] : [0.96, 0.97, 0.975];
      drawer.draw(panels.slice(0, data.moments[moment].length), view, paper);
    });
    const names = element(stage, "div", "", "names");
    const voxelsOf = panel => {
      if (!cache.has(panel)) cache.set(panel, panel.voxels ? unpackVoxels(panel) : Promise.resolve(null));
      return cache.get(panel);
    };
    const edgesOf = (panel, all) => {
      const out = [], grid = panel.grid, reach = grid ? Math.max(...grid.lo.map(Math.abs)) : 50;
      groundLines(Math.max(10, Math.floor(reach / 10) * 10), [0.5, 0.55, 0.6, 0.28], out);
      boxLines(EGO, [0.5, 0.5, 0.52, 1], out);
      out.push(3.75, 0, 0.1, 7, 0, 0.1, 0.86, 0.2, 0.2, 1);  // forward
      const colourOf = box => [...data.colours[data.boxLabels[box[7]]].map(v => v / 255), 1];
      const shown = box => !state.hidden.has(data.boxLabels[box[7]]);
      if (state.boxes) for (const box of panel.boxes.filter(shown)) boxLines(box, colourOf(box), out);
      if (state.over && all.length > 1 && panel === all[0])
        for (const box of all[1].boxes.filter(shown)) boxLines(box, [0.08, 0.63, 0.27, 1], out);
      return out;
    };
    const refresh = async () => {
      const wanted = moment, all = data.moments[moment], unpacked = await Promise.all(all.map(voxelsOf));
      if (wanted !== moment) return;
      names.replaceChildren();
      all.forEach((panel, index) => {
        panels[index] = panels[index] || drawer.make();
        const cells = unpacked[index] ? instances(panel, unpacked[index], data, state) : new Float32Array(0);
        drawer.set(panels[index], panel.grid, cells, edgesOf(panel, all));
        element(names, "span", panel.title);
      });
      paint();
      root.dataset.shown = String(moment);
    };
    const chips = element(root, "div", "", "chips");
    for (const [name, place] of Object.entries(VIEWS)) {
      const button = element(chips, "button", name, "chip");
      button.type = "button";
      button.onclick = () => { view.place = [...place]; view.target = [6, 0, 0]; paint(); };
    }
    const panelsOf = data.moments.flat();
    if (panelsOf.some(p => p.boxes.length)) addToggle(chips, "Boxes", true, on => { state.boxes = on; refresh(); });
    if (data.moments.some(m => m.length > 1 && m[1].boxes.length))
      addToggle(chips, "True boxes over the prediction", false, on => { state.over = on; refresh(); });
    if (state.knownOnly) addToggle(chips, "Only voxels whose truth is known", true, on => { state.knownOnly = on; refresh(); });
    const filter = element(root, "div", "", "chips");
    const present = new Set(panelsOf.flatMap(panel => panel.present));
    const classes = data.classes.map((name, label) => ({ name, label })).filter(c => present.has(c.label));
    const toggles = [];
    const setAll = on => {
      state.hidden = new Set(on ? [] : classes.map(c => c.label));
      for (const toggle of toggles) toggle.ariaPressed = String(on);
      refresh();
    };
    if (panelsOf.some(p => p.voxels && !p.heights) || panelsOf.some(p => p.boxes.length)) {
      for (const [text, on] of [["All classes", true], ["No class", false]]) {
        const button = element(filter, "button", text, "chip");
        button.type = "button"; button.onclick = () => setAll(on);
      }
      for (const { name, label } of classes) toggles.push(addToggle(filter, name, true, on => {
        if (on) state.hidden.delete(label); else state.hidden.add(label);
        refresh();
      }, data.colours[label]));
    }
    root.showMoment = async index => { moment = index; await refresh(); };
    root.turn = (yaw, pitch, distance) => { view.place = [yaw, pitch, distance]; paint(); };
    addPointer(canvas, view, paint);
    new ResizeObserver(paint).observe(canvas);
    dark.addEventListener("change", paint);
    if (data.moments.length) refresh();
  }

  for (const root of document.querySelectorAll("div.space")) start(root);
})();
