"use strict";
// LLaVA in plain JavaScript: tiny's whole forward pass, to be read beside the Python.
//
//   vision.*  is vision.py     from a picture to one vector for each patch
//   llama.*   is llama.py      tokenizer, decoder, KV cache
//   weights.* is weights.py    the file's numbers under our names
//   llava.*   is llava.py      projector, merge, prompt, the loop over time
//
// The names are those of the Python, so is the order; tests/parity.py compares the two stage by stage. What differs:
// there is one picture and one row, so N and B are left out; a matrix (rows, columns) is one Float32Array, row after
// row; sums are taken in double precision, as JavaScript does it, and every result is kept in float32.
//
// `planted` names one of the bugs below, or nothing: bugs of real programs, as notebook 6 collects them. Each changes
// one line of what really runs.

let planted = "";
const BUGS = {
  channels: { stage: "pixels", says: "Red and blue are swapped",
    means: "Some programs store a colour as red, green, blue, others the other way round. Here they are mixed up." },
  flatten: { stage: "vision.1", says: "The eye’s heads are laid out wrongly",
    means: "The eye looks in several ways at once, its heads. Here their results are not put side by side, but one " +
      "behind the other: all numbers are there, in the wrong places." },
  class: { stage: "projector", says: "The class token is kept",
    means: "In front of the patches the eye keeps one vector for the whole picture. Who forgets to drop it moves " +
      "every patch on by one place, and loses the last." },
  late: { stage: "projector", says: "The eye is read one block late",
    means: "LLaVA reads the eye one block before its end. Here it reads the end itself, which it was not trained on." },
  rope: { stage: "llama.1", says: "The words have no order",
    means: "The decoder turns its numbers by an angle that says where each word stands (RoPE). Here that angle is " +
      "always zero: it has the words, but not their order." },
};

// x Wᵀ + b for x (rows, inputs), W (outputs, inputs): torch's nn.Linear, where nearly all of the time goes. Four
// outputs of W lie side by side, and four rows of x are taken at once: each number that is fetched is used four times.
function linear(x, layer) {
  const { bias, inputs, outputs } = layer, w = layer.packed ??= pack(layer), rows = x.length / inputs, end = 4 * inputs;
  const y = new Float32Array(rows * outputs), four = new Float64Array(end);
  let row = 0;
  for (; row + 4 <= rows; row += 4) {
    for (let i = 0; i < end; i++) four[i] = x[(row + i % 4) * inputs + (i >> 2)];
    for (let out = 0; out < outputs; out += 4) {
      let a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0; // a row of x each: a, b, c, d
      let c0 = 0, c1 = 0, c2 = 0, c3 = 0, d0 = 0, d1 = 0, d2 = 0, d3 = 0;
      for (let i = 0, at = out * inputs; i < end; i += 4, at += 4) {
        const a = four[i], b = four[i + 1], c = four[i + 2], d = four[i + 3];
        const p = w[at], q = w[at + 1], r = w[at + 2], s = w[at + 3];
        a0 += a * p; a1 += a * q; a2 += a * r; a3 += a * s;
        b0 += b * p; b1 += b * q; b2 += b * r; b3 += b * s;
        c0 += c * p; c1 += c * q; c2 += c * r; c3 += c * s;
        d0 += d * p; d1 += d * q; d2 += d * r; d3 += d * s;
      }
      let at = row * outputs + out;
      y[at] = a0; y[at + 1] = a1; y[at + 2] = a2; y[at + 3] = a3; at += outputs;
      y[at] = b0; y[at + 1] = b1; y[at + 2] = b2; y[at + 3] = b3; at += outputs;
      y[at] = c0; y[at + 1] = c1; y[at + 2] = c2; y[at + 3] = c3; at += outputs;
      y[at] = d0; y[at + 1] = d1; y[at + 2] = d2; y[at + 3] = d3;
    }
  }
  for (; row < rows; row++) // those that are left over, and the one row of a step
    for (let out = 0; out < outputs; out += 4) {
      let a0 = 0, a1 = 0, a2 = 0, a3 = 0;
      for (let i = row * inputs, at = out * inputs; i < (row + 1) * inputs; i++, at += 4) {
        const a = x[i];
        a0 += a * w[at]; a1 += a * w[at + 1]; a2 += a * w[at + 2]; a3 += a * w[at + 3];
      }
      const at = row * outputs + out;
      y[at] = a0; y[at + 1] = a1; y[at + 2] = a2; y[at + 3] = a3;
    }
  if (bias) for (let i = 0; i < y.length; i++) y[i] += bias[i % outputs];
  return y; // (rows, outputs)
}

// W (outputs, inputs) → the same numbers, those of four outputs at each input side by side.
function pack({ weight, inputs, outputs }) {
  const packed = new Float32Array(weight.length);
  for (let out = 0; out < outputs; out++)
    for (let i = 0; i < inputs; i++) packed[(out - out % 4) * inputs + 4 * i + out % 4] = weight[out * inputs + i];
  return packed;
}

const add = (x, y) => x.map((number, i) => number + y[i]);
const range = n => Array.from({ length: n }, (_, i) => i);

function dot(x, at, y, there, length) {
  let sum = 0;
  for (let i = 0; i < length; i++) sum += x[at + i] * y[there + i];
  return sum;
}

// The scores of one query become weights that add up to 1.
function softmax(scores, length) {
  let most = -Infinity, sum = 0;
  for (let i = 0; i < length; i++) most = Math.max(most, scores[i]);
  for (let i = 0; i < length; i++) sum += scores[i] = Math.exp(scores[i] - most);
  for (let i = 0; i < length; i++) scores[i] /= sum;
  return scores;
}

// ---------------------------------------------------------------------------------------------------------------------
// vision.py

const vision = {
  // ImageData (RGBA) → bytes in RGB; what is transparent shows white. In whole numbers, as Pillow's alpha_composite.
  to_rgb({ width, height, data }) {
    const rgb = new Uint8Array(width * height * 3);
    for (let i = 0, j = 0; j < rgb.length; i += 4, j += 3) {
      const alpha = data[i + 3];
      for (let c = 0; c < 3; c++) {
        const sum = 128 * (data[i + c] * alpha + 255 * (255 - alpha) + 128); // 7 bits more than a byte, and a half
        rgb[j + c] = ((sum >>> 8) + sum) >>> 15; // divided by 255
      }
    }
    return { width, height, data: rgb };
  },

  // One picture → float32 (3, H, W): the short side becomes so many pixels, the middle square is kept, then normalised.
  preprocess(image, config) {
    image = vision.to_rgb(image);
    const [width, height, left, top] = vision.framing(image.width, image.height, config);
    image = vision.resize(image, width, height);
    const { crop_size: { width: W, height: H }, rescale_factor, image_mean, image_std } = config;
    const pixels = new Float32Array(3 * H * W), fround = Math.fround;
    for (let c = 0; c < 3; c++)
      for (let y = 0; y < H; y++)
        for (let x = 0; x < W; x++) {
          const channel = planted === "channels" ? 2 - c : c;
          const byte = image.data[((top + y) * width + left + x) * 3 + channel];
          const number = fround(fround(byte * rescale_factor) - fround(image_mean[c]));
          pixels[(c * H + y) * W + x] = number / fround(image_std[c]);
        }
    return pixels; // (3, H, W)
  },

  // How preprocess scales a picture, and where the part that it keeps begins.
  framing(width, height, config) {
    const short = Math.min(width, height), long = Math.max(width, height), edge = config.size.shortest_edge;
    if (!short || edge * edge * long / short > 2 * 89478485)
      throw new Error(`a picture of ${width} x ${height} pixels is too thin: pad it to a square or crop it`);
    const other = Math.floor(edge * long / short); // truncated, not rounded
    const [w, h] = width <= height ? [edge, other] : [other, edge];
    return [w, h, Math.floor((w - config.crop_size.width) / 2), Math.floor((h - config.crop_size.height) / 2)];
  },

  // Pillow's Image.resize with BICUBIC, to the byte: across, then down, with whole-number weights of 22 bits. Since
  // Pillow 13 a picture that loses over twice as many rows as columns is resized down first: what lies between is
  // rounded to bytes, so that this shows.
  resize(image, width, height) {
    const tall = image.height > height && image.height - height > 2 * (image.width - width);
    for (const across of tall ? [false, true] : [true, false]) {
      const size = across ? width : height;
      if (size !== (across ? image.width : image.height)) image = vision.resample(image, size, across);
    }
    return image;
  },

  resample({ width, height, data }, size, across) {
    const length = across ? width : height, scale = length / size, wide = Math.max(scale, 1), reach = 2 * wide;
    const [W, H] = across ? [size, height] : [width, size], out = new Uint8ClampedArray(W * H * 3);
    const step = across ? 3 : 3 * width; // from one byte to the next along the line that is resized
    for (let i = 0; i < size; i++) {
      const centre = (i + 0.5) * scale;
      const first = Math.max(0, Math.trunc(centre - reach + 0.5));
      const end = Math.min(length, Math.trunc(centre + reach + 0.5));
      const weights = range(end - first).map(k => vision.bicubic((k + first - centre + 0.5) / wide));
      const sum = weights.reduce((a, b) => a + b, 0);
      const whole = weights.map(w => Math.trunc((w / sum) * (1 << 22) + (w / sum < 0 ? -0.5 : 0.5)));
      for (let line = 0; line < (across ? H : W); line++)
        for (let c = 0; c < 3; c++) {
          const from = (across ? line * 3 * width : line * 3) + first * step + c;
          let total = 1 << 21; // half, so that what is cut off below rounds
          for (let k = 0; k < whole.length; k++) total += data[from + k * step] * whole[k];
          out[(across ? line * W + i : i * W + line) * 3 + c] = total >> 22; // clamped to 0 … 255
        }
    }
    return { width: W, height: H, data: out };
  },

  bicubic(x) {
    x = Math.abs(x);
    if (x < 1) return ((-0.5 + 2) * x - (-0.5 + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
  },

  quick_gelu: x => x / (1 + Math.exp(-1.702 * x)), // x σ(1.702 x)

  layer_norm(x, { weight, bias }, eps) {
    const D = weight.length, y = new Float32Array(x.length);
    for (let at = 0; at < x.length; at += D) {
      let mean = 0, variance = 0;
      for (let i = 0; i < D; i++) mean += x[at + i] / D;
      for (let i = 0; i < D; i++) variance += (x[at + i] - mean) ** 2 / D;
      const scale = 1 / Math.sqrt(variance + eps);
      for (let i = 0; i < D; i++) y[at + i] = (x[at + i] - mean) * scale * weight[i] + bias[i];
    }
    return y;
  },

  // Every patch looks at every patch: softmax(q kᵀ / √E) v, in A heads side by side.
  attention(x, { wq, wk, wv, wo }, heads) {
    const q = linear(x, wq), k = linear(x, wk), v = linear(x, wv), D = wq.outputs; // (S, D)
    const S = x.length / D, E = D / heads, y = new Float32Array(S * D);
    const scores = new Float64Array(S), sum = new Float64Array(E);
    for (let head = 0; head < heads; head++)
      for (let s = 0; s < S; s++) {
        for (let t = 0; t < S; t++) scores[t] = dot(q, s * D + head * E, k, t * D + head * E, E) / Math.sqrt(E);
        softmax(scores, S);
        sum.fill(0);
        for (let t = 0; t < S; t++)
          for (let e = 0, at = t * D + head * E; e < E; e++) sum[e] += scores[t] * v[at + e];
        y.set(sum, planted === "flatten" ? (head * S + s) * E : s * D + head * E);
      }
    return linear(y, wo); // (S, D)
  },

  mlp(x, { fc1, fc2 }) {
    return linear(linear(x, fc1).map(vision.quick_gelu), fc2); // (S, D)
  },

  block(x, { norm1, attention, norm2, mlp }, config) {
    const { num_attention_heads: heads, layer_norm_eps: eps } = config;
    x = add(x, vision.attention(vision.layer_norm(x, norm1, eps), attention, heads));
    return add(x, vision.mlp(vision.layer_norm(x, norm2, eps), mlp)); // (S, D)
  },

  // Pixels (3, H, W) → the patches' embeddings (S, D): a class token, then one linear layer applied to each patch.
  embed(pixels, { class_embedding, patch_embedding, position_embedding, pre_norm }, config) {
    const { image_size, patch_size } = config, grid = image_size / patch_size;
    const patches = new Float32Array(3 * image_size * image_size); // (P, 3 · patch · patch)
    let at = 0;
    for (let row = 0; row < grid; row++)
      for (let column = 0; column < grid; column++)
        for (let c = 0; c < 3; c++)
          for (let y = 0; y < patch_size; y++)
            for (let x = 0; x < patch_size; x++)
              patches[at++] = pixels[(c * image_size + row * patch_size + y) * image_size + column * patch_size + x];
    const x = new Float32Array(position_embedding.length);
    x.set(class_embedding);
    x.set(linear(patches, patch_embedding), class_embedding.length);
    return vision.layer_norm(add(x, position_embedding), pre_norm, config.layer_norm_eps);
  },

  // The hidden states of the asked layers: 0 is the embedding, i the output of block i, -1 the last.
  tower(pixels, layers, model, config) {
    layers = layers.map(layer => layer < 0 ? layer + model.blocks.length + 1 : layer);
    const states = [vision.embed(pixels, model, config)];
    for (const block of model.blocks.slice(0, Math.max(...layers)))
      states.push(vision.block(states.at(-1), block, config));
    return layers.map(layer => states[layer]);
  },
};

// ---------------------------------------------------------------------------------------------------------------------
// llama.py

const llama = {
  // Byte-pair encoding as tokenizer.json describes it.
  tokenizer(file) {
    const { vocab, merges } = file.model, tokens = Object.keys(vocab).reduce((all, t) => (all[vocab[t]] = t, all), []);
    const special = new Set();
    for (const { id, content } of file.added_tokens) {
      tokens[id] = content;
      special.add(id);
    }
    const rank = new Map(merges.map((pair, i) => [Array.isArray(pair) ? pair.join(" ") : pair, i]));
    const start = file.post_processor.single.filter(p => p.SpecialToken).map(p => tokens.indexOf(p.SpecialToken.id));
    return { vocab, tokens, special, rank, start };
  },

  // Text → ids, without <s>. Special tokens in it are ordinary letters.
  encode(text, { vocab, rank }) {
    if (!text) return [];
    const hex = byte => `<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`;
    const bytes = letter => Array.from(new TextEncoder().encode(letter), hex);
    const pieces = [...("▁" + text).replaceAll(" ", "▁")].flatMap(letter => letter in vocab ? [letter] : bytes(letter));
    for (;;) { // join the pair that was learnt first, the leftmost of them, until none is left
      let best = Infinity, at = -1;
      for (let i = 0; i + 1 < pieces.length; i++) {
        const r = rank.get(pieces[i] + " " + pieces[i + 1]);
        if (r < best) [best, at] = [r, i];
      }
      if (at < 0) return pieces.map(piece => vocab[piece]);
      pieces.splice(at, 2, pieces[at] + pieces[at + 1]);
    }
  },

  // Ids → text, special tokens left out; bytes that are no character become U+FFFD.
  decode(ids, { tokens, special }) {
    let text = "", bytes = [];
    const flush = () => {
      try {
        text += new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(new Uint8Array(bytes));
      } catch {
        text += "\ufffd".repeat(bytes.length);
      }
      bytes = [];
    };
    for (const id of ids.filter(id => !special.has(id))) {
      const byte = /^<0x([0-9A-F]{2})>$/.exec(tokens[id]);
      if (byte) bytes.push(parseInt(byte[1], 16));
      else {
        flush();
        text += tokens[id].replaceAll("▁", " ");
      }
    }
    flush();
    return text.replace(/^ /, "");
  },

  rms_norm(x, { weight }, eps) {
    const D = weight.length, y = new Float32Array(x.length);
    for (let at = 0; at < x.length; at += D) {
      let square = 0;
      for (let i = 0; i < D; i++) square += x[at + i] ** 2 / D;
      const scale = 1 / Math.sqrt(square + eps);
      for (let i = 0; i < D; i++) y[at + i] = x[at + i] * scale * weight[i];
    }
    return y;
  },

  // Position m turns the i-th pair of dimensions by m · theta^(-2i/E) → cos, sin (T, E / 2).
  rope_angles(past, T, E, theta) {
    const angles = range(T).flatMap(t => range(E / 2).map(i => {
      const frequency = Math.fround(1 / Math.fround(theta ** Math.fround(2 * i / E)));
      return planted === "rope" ? 0 : Math.fround((past + t) * frequency);
    }));
    return [angles.map(Math.cos), angles.map(Math.sin)];
  },

  // Turn queries or keys (T, heads · E) by their angles, in place: dimension i is paired with i + E/2.
  rotate(x, cos, sin, E) {
    const half = E / 2, T = cos.length / half, width = x.length / T;
    for (let t = 0; t < T; t++)
      for (let head = t * width; head < (t + 1) * width; head += E)
        for (let i = 0; i < half; i++) {
          const first = x[head + i], second = x[head + half + i], c = cos[t * half + i], s = sin[t * half + i];
          x[head + i] = first * c - second * s;
          x[head + half + i] = second * c + first * s;
        }
    return x;
  },

  // softmax(q kᵀ / √E) v over the keys up to one's own. q (T, H · E); k, v (S, K · E). watch(t, weights): hears them.
  attend(q, k, v, past, { num_attention_heads: H, num_key_value_heads: K, head_dim: E }, watch) {
    const T = q.length / (H * E), y = new Float32Array(q.length);
    const scores = new Float64Array(past + T), sum = new Float64Array(E);
    for (let head = 0; head < H; head++)
      for (let t = 0; t < T; t++) {
        const from = t * H * E + head * E, shared = Math.floor(head / (H / K)) * E;
        const S = past + t + 1; // causal: no later key
        for (let s = 0; s < S; s++) scores[s] = dot(q, from, k, s * K * E + shared, E) / Math.sqrt(E);
        softmax(scores, S);
        if (watch) watch(past + t, scores);
        sum.fill(0);
        for (let s = 0; s < S; s++)
          for (let e = 0, at = s * K * E + shared; e < E; e++) sum[e] += scores[s] * v[at + e];
        y.set(sum, from);
      }
    return y; // (T, H · E)
  },

  attention(x, { wq, wk, wv, wo }, cos, sin, cached, past, config, watch) {
    const E = config.head_dim;
    const q = llama.rotate(linear(x, wq), cos, sin, E), k = llama.rotate(linear(x, wk), cos, sin, E);
    cached.keys.set(k, past * wk.outputs);
    cached.values.set(linear(x, wv), past * wv.outputs);
    return linear(llama.attend(q, cached.keys, cached.values, past, config, watch), wo); // (T, D)
  },

  silu: x => x / (1 + Math.exp(-x)),

  mlp(x, { gate, up, down }) {
    const open = linear(x, gate).map(llama.silu), through = linear(x, up);
    return linear(open.map((number, i) => number * through[i]), down); // (T, D)
  },

  block(x, { attention_norm, attention, mlp_norm, mlp }, cos, sin, cached, past, config, watch) {
    const normed = llama.rms_norm(x, attention_norm, config.rms_norm_eps);
    x = add(x, llama.attention(normed, attention, cos, sin, cached, past, config, watch));
    return add(x, llama.mlp(llama.rms_norm(x, mlp_norm, config.rms_norm_eps), mlp)); // (T, D)
  },

  // Embeddings x (T, D) behind what the cache holds → the last hidden state after the norm (T, D).
  forward(x, model, config, kv_cache, note, watch) {
    const T = x.length / config.hidden_size, past = kv_cache.length;
    const [cos, sin] = llama.rope_angles(past, T, config.head_dim, config.rope_theta);
    model.blocks.forEach((block, i) => {
      x = llama.block(x, block, cos, sin, kv_cache.layers[i], past, config, watch);
      if (i + 1 < model.blocks.length) note(`llama.${i + 1}`, x, config.hidden_size);
    });
    x = llama.rms_norm(x, model.norm, config.rms_norm_eps);
    note(`llama.${model.blocks.length}`, x, config.hidden_size);
    kv_cache.length += T;
    return x;
  },

  init_kv_cache(config, max_length) {
    const size = max_length * config.num_key_value_heads * config.head_dim, empty = () => new Float32Array(size);
    return { length: 0, layers: range(config.num_hidden_layers).map(() => ({ keys: empty(), values: empty() })) };
  },
};

// ---------------------------------------------------------------------------------------------------------------------
// weights.py: a safetensors file is the length of a header, the header (name → dtype, shape, where), and the numbers

const weights = {
  NAMES: [ // as they are published → as we call them
    ["vision_tower.vision_model.embeddings.class_embedding", "vision.class_embedding"],
    ["vision_tower.vision_model.embeddings.position_embedding.weight", "vision.position_embedding"],
    ["vision_tower.vision_model.embeddings.", "vision."],
    ["vision_tower.vision_model.pre_layrnorm.", "vision.pre_norm."], // sic
    ["vision_tower.vision_model.post_layernorm.", "vision.post_norm."], // never run
    ["vision_tower.vision_model.encoder.layers.", "vision.blocks."],
    ["multi_modal_projector.", "projector."],
    ["language_model.model.embed_tokens.", "llama.embed."],
    ["language_model.model.layers.", "llama.blocks."],
    ["language_model.model.norm.", "llama.norm."],
    ["language_model.lm_head.", "llama.head."],
    [".layer_norm", ".norm"], [".self_attn.", ".attention."], [".input_layernorm.", ".attention_norm."],
    [".post_attention_layernorm.", ".mlp_norm."], [".q_proj.", ".wq."], [".k_proj.", ".wk."], [".v_proj.", ".wv."],
    [".out_proj.", ".wo."], [".o_proj.", ".wo."], [".gate_proj.", ".gate."], [".up_proj.", ".up."],
    [".down_proj.", ".down."],
  ],

  our_name: name => weights.NAMES.reduce((ours, [theirs, own]) => ours.replace(theirs, own), name),

  // The file → a tree: model.vision.blocks[0].attention.wq = { weight, bias, inputs, outputs }.
  read(file) {
    const view = new DataView(file), length = Number(view.getBigUint64(0, true)), model = {};
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(file, 8, length)));
    let parameters = 0;
    delete header.__metadata__;
    for (const [name, { dtype, shape, data_offsets: [begin, end] }] of Object.entries(header)) {
      if (dtype !== "F16") throw new Error(`${name} is stored as ${dtype}, and this page reads F16`);
      const halves = new Uint16Array(file.slice(8 + length + begin, 8 + length + end));
      const path = weights.our_name(name).split("."), last = path.pop();
      const part = path.reduce((at, step, i) => at[step] ??= /^\d+$/.test(path[i + 1]) ? [] : {}, model);
      part[last] = Float32Array.from(halves, weights.float);
      parameters += halves.length;
      if (last === "weight" && shape.length > 1) // a convolution whose stride is its width is linear in each patch
        Object.assign(part, { outputs: shape[0], inputs: shape.slice(1).reduce((a, b) => a * b) });
    }
    return Object.assign(model, { parameters });
  },

  // The 16 bits of a half: sign, five of the exponent, ten of the fraction.
  float(bits) {
    const sign = bits & 0x8000 ? -1 : 1, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? 2 ** (exponent - 25) * (1024 + fraction) : 2 ** -24 * fraction);
  },
};

// ---------------------------------------------------------------------------------------------------------------------
// llava.py

const llava = {
  load(files) {
    const model = weights.read(files.weights), config = files.config, vision_config = config.vision_config;
    const P = (vision_config.image_size / vision_config.patch_size) ** 2, ends = files.generation.eos_token_id;
    return Object.assign(model, { config, P, preprocess_config: files.preprocessor, eos: [ends].flat(),
      tokenizer: llama.tokenizer(files.tokenizer) });
  },

  // 2/√π e^(-x²) Σ 2ⁿ x²ⁿ⁺¹ / (1 · 3 · … · (2n+1)): all terms have one sign, so nothing cancels.
  erf(x) {
    if (Math.abs(x) > 6) return Math.sign(x);
    let term = x, sum = x;
    for (let n = 1; Math.abs(term) > 1e-17 * Math.abs(sum); n++) sum += term *= 2 * x * x / (2 * n + 1);
    return 2 / Math.sqrt(Math.PI) * Math.exp(-x * x) * sum;
  },

  gelu: x => x / 2 * (1 + llava.erf(x / Math.SQRT2)),

  // The bridge: two linear layers with an exact GELU between them.
  projector(x, { linear_1, linear_2 }) {
    return linear(linear(x, linear_1).map(llava.gelu), linear_2); // (P, D)
  },

  // Pixels (3, H, W) → one embedding for each patch, (P, D).
  get_image_features(pixel_values, model, note) {
    const { vision_config, vision_feature_layer } = model.config, C = vision_config.hidden_size;
    const layer = planted === "late" ? vision_feature_layer + 1 : vision_feature_layer;
    const last = layer < 0 ? layer + model.vision.blocks.length + 1 : layer;
    const states = vision.tower(pixel_values, range(last + 1), model.vision, vision_config); // (S, C) each
    states.forEach((state, i) => note(`vision.${i}`, state, C));
    const first = planted === "class" ? 0 : 1; // the class token stands in front
    return llava.projector(states[last].subarray(first * C, (first + model.P) * C), model.projector);
  },

  // Embed the ids (T) and put the features (P, D) where the image tokens stand → (T, D).
  merge(input_ids, features, { llama: { embed }, config }) {
    const D = embed.inputs, x = new Float32Array(input_ids.length * D);
    let patch = 0;
    input_ids.forEach((id, t) => {
      const [from, row] = id === config.image_token_index ? [features, patch++] : [embed.weight, id];
      x.set(from.subarray(row * D, (row + 1) * D), t * D);
    });
    return x;
  },

  // "<s>USER: <image>\n… ASSISTANT:" → ids. What stands between two special tokens is encoded as a whole.
  chat(question, { tokenizer, config }) {
    const before = llama.encode("USER: ", tokenizer), after = llama.encode(`\n${question} ASSISTANT:`, tokenizer);
    return [...tokenizer.start, ...before, config.image_token_index, ...after];
  },

  // Grow the image token into one for each patch.
  expand(input_ids, { config, P }) {
    return input_ids.flatMap(id => id === config.image_token_index ? Array(P).fill(id) : [id]);
  },

  // The one loop over time: prefill, then choose and step in turn. Yields each id with its logits, to the answer's end.
  // note(name, numbers, width): hears each stage. watch: see llama.attend.
  *stream(input_ids, pixel_values, model, note, watch) {
    const { config: { text_config }, eos } = model, room = text_config.max_position_embeddings;
    const features = llava.get_image_features(pixel_values, model, note);
    note("projector", features, text_config.hidden_size);
    let x = llava.merge(input_ids, features, model), kv_cache = llama.init_kv_cache(text_config, room);
    note("merge", x, text_config.hidden_size);
    while (kv_cache.length + x.length / text_config.hidden_size <= room) {
      x = llama.forward(x, model.llama, text_config, kv_cache, note, watch).subarray(-text_config.hidden_size);
      const logits = linear(x, model.llama.head), id = llava.sample(logits); // (V)
      yield { id, logits };
      if (eos.includes(id)) return;
      x = model.llama.embed.weight.slice(id * text_config.hidden_size, (id + 1) * text_config.hidden_size);
      note = () => {}; // the steps after the first have the same stages
    }
  },

  sample(logits) { // greedy: the likeliest
    let best = 0;
    for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
    return best;
  },

  // What is done to the picture before the eye sees it: nothing, a plain cover, or its patches in another order.
  change(pixels, how, { image_size, patch_size }) {
    if (how === "cover") return pixels.map(() => 0);
    if (how !== "shuffle") return pixels;
    const grid = image_size / patch_size, P = grid * grid, out = new Float32Array(pixels.length);
    for (let patch = 0; patch < P; patch++) {
      const from = (patch * 30 + 17) % P; // 30 and 49 have no common factor, so each patch comes once
      const [x, y, u, v] = [patch % grid, Math.floor(patch / grid), from % grid, Math.floor(from / grid)];
      for (let c = 0; c < 3; c++)
        for (let line = 0; line < patch_size; line++) {
          const at = (row, column) => ((c * grid + row) * patch_size + line) * image_size + column * patch_size;
          out.set(pixels.subarray(at(v, u), at(v, u) + patch_size), at(y, x));
        }
    }
    return out;
  },
};

// ---------------------------------------------------------------------------------------------------------------------
// What the page asks for. From here on there is nothing of LLaVA: it is written down what happened.

// Attention of words on patches, a row for each word → how much more each looks there than all do on average, as in
// extras/lens.py.
function without_sinks(rows) {
  const mean = rows[0].map((_, i) => rows.reduce((sum, row) => sum + row[i] / rows.length, 0));
  return rows.map(row => row.map((weight, i) => Math.max(0, weight - mean[i])));
}

// Every stage of one pass, named as in tests/parity.py: { name: { shape, data } }.
function stages(model, image, question, change) {
  const { config, P } = model, ids = llava.expand(llava.chat(question, model), model), found = {}, seen = {};
  const pixels = llava.change(vision.preprocess(image, model.preprocess_config), change, config.vision_config);
  const size = config.vision_config.image_size;
  const put = (name, data, ...shape) => found[name] = { shape: [1, ...shape], data };
  llava.stream(ids, pixels, model, (name, data, width) => seen[name] = [data, data.length / width, width]).next();
  put("ids", Float32Array.from(ids), ids.length);
  put("pixels", pixels, 3, size, size);
  vision.tower(pixels, range(model.vision.blocks.length + 1), model.vision, config.vision_config) // the unused one, too
    .forEach((state, i) => put(`vision.${i}`, state, P + 1, config.vision_config.hidden_size));
  for (const name of Object.keys(seen).filter(name => !name.startsWith("vision"))) put(name, ...seen[name]);
  const logits = linear(found[`llama.${model.llama.blocks.length}`].data, model.llama.head);
  put("logits", logits, ids.length, model.llama.head.outputs);
  return found;
}

// Yields { word } for each of at most `limit` tokens, at last { done }: where each looked, and every stage on the way.
function* answer(model, image, question, change, limit = Infinity) {
  const began = performance.now(), { config, tokenizer, P } = model;
  const ids = llava.expand(llava.chat(question, model), model), first = ids.lastIndexOf(config.image_token_index) + 1;
  if (ids.length >= config.text_config.max_position_embeddings) throw new Error("The question is too long for tiny.");
  const pixels = llava.change(vision.preprocess(image, model.preprocess_config), change, config.vision_config);
  const looks = [], found = { pixels }, said = [];
  const share = 1 / (model.llama.blocks.length * config.text_config.num_attention_heads);
  const watch = (t, scores) => { // the mean over blocks and heads of what a word behind the picture looks at on it
    if (t < first) return;
    const look = looks[t - first] ??= new Float32Array(P);
    for (let i = 0; i < P; i++) look[i] += scores[first - P + i] * share;
  };
  let shown = 0;
  for (const { id, logits } of llava.stream(ids, pixels, model, (name, data) => found[name] = data, watch)) {
    said.push(id);
    const chances = softmax(Float64Array.from(logits), logits.length), text = llama.decode(said, tokenizer);
    const others = [], left = chances.slice();
    for (let token = id; others.length < 5; others.push(token)) { // the likeliest of those that are left
      left[token] = -1;
      token = llava.sample(left);
    }
    const written = token => (tokenizer.tokens[token] ?? `id ${token}`).replaceAll("▁", " ");
    let piece = "";
    if (!text.endsWith("\ufffd")) { // the bytes of a character wait for the rest
      piece = text.slice(shown).replaceAll("\ufffd", "");
      shown = text.length;
    }
    yield { word: { id, text: piece || written(id), end: model.eos.includes(id), p: chances[id], logits,
      others: others.map(other => [written(other), chances[other]]), ms: performance.now() - began } };
    if (said.length >= limit) break;
  }
  const question_words = ids.length - first; // the last of them chose the answer's first word
  const labels = ids.map(id => id === config.image_token_index ? null : tokenizer.tokens[id].replaceAll("▁", " "));
  yield { done: { text: llama.decode(said, tokenizer), ids: said, ms: performance.now() - began, stages: found, labels,
    share: looks.slice(question_words - 1).map(look => look.reduce((a, b) => a + b)),
    looks: without_sinks(looks).slice(question_words - 1) } };
}

// Jobs come in, and words go out as they are chosen; { stop: job } ends an answer that is under way.
function serve(post) {
  let model = null;
  const { port1, port2 } = new MessageChannel(), waiting = [], stopped = new Set();
  port1.onmessage = () => waiting.shift()();
  const pause = () => new Promise(go => (waiting.push(go), port2.postMessage(0))); // lets other jobs and a { stop } in
  return async ({ job, load, stop, kind, image, question, limit = Infinity, bug = "", change = "" }) => {
    try {
      if (stop) stopped.add(stop);
      else if (load) {
        model = llava.load(load);
        post({ job, done: { parameters: model.parameters, config: model.config, bugs: BUGS } });
      } else if (kind === "stages") {
        planted = bug;
        post({ job, done: stages(model, image, question, change) });
      } else {
        const messages = answer(model, image, question, change, limit);
        for (let done = false; !done && !stopped.has(job); await pause()) {
          planted = bug; // another job may have come in between
          const { value } = messages.next();
          post({ job, ...value });
          done = value.done;
        }
        if (stopped.delete(job)) post({ job, stopped: true });
      }
    } catch (error) {
      post({ job, error: error.message });
    }
  };
}
