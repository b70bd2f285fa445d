"use strict";
// LLaVA in plain JavaScript: tiny's whole forward pass, to be read beside the Python.
//
//   vision.*  is vision.py     from a picture to one vector for each patch
//   llama.*   is llama.py      tokenizer, decoder, KV cache, the choice of the next word
//   llava.*   is llava.py      projector, merge, the loop over time, the prompt
//
// The names are those of the Python, so is the order; tests/parity.py compares the two stage by stage. What differs:
// there is one picture and one row, so N and B are left out; there is tiny alone, and not what others need; and what
// libraries do there is written out. PyTorch's part is in playground.torch.js, weights.py is
// playground.weights.js, and playground.worker.js writes down what the page wants to know of a pass.
//
// note(name, numbers, width) hears each stage; watch(t, weights), in every head, what position t looks at.

let planted = ""; // the name of one of five bugs of real programs (notebook 6 has them, too), each a line below

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

  // Every patch looks at every patch, in A heads side by side.
  attention(x, { wq, wk, wv, wo }, A) {
    const C = wq.outputs, S = x.length / C, E = C / A;
    const q = linear(x, wq), k = linear(x, wk), v = linear(x, wv); // (S, C)
    x = scaled_dot_product_attention(q, k, v, { A, K: A, E }, () => S); // (A, S, E)
    return linear(planted === "flatten" ? x : transpose(x, A, E), wo); // (S, C)
  },

  mlp(x, { fc1, fc2 }) {
    x = linear(x, fc1).map(vision.quick_gelu); // (S, F)
    return linear(x, fc2); // (S, C)
  },

  block(x, { norm1, attention, norm2, mlp }, { num_attention_heads, layer_norm_eps }) {
    x = add(x, vision.attention(layer_norm(x, norm1, layer_norm_eps), attention, num_attention_heads));
    return add(x, vision.mlp(layer_norm(x, norm2, layer_norm_eps), mlp)); // (S, C)
  },

  // Pixels (3, H, W) → the patches' embeddings (S, C): a class token, then one linear layer applied to each patch.
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
    return layer_norm(add(x, position_embedding), pre_norm, config.layer_norm_eps);
  },

  // The hidden states of the asked layers: 0 is the embedding, i the output of block i, -1 the last.
  forward(pixels, layers, model, config) {
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

  // By how much each pair of dimensions turns from one position to the next: theta^(-2i/E), (E / 2).
  frequencies({ head_dim: E, rope_theta }) {
    return range(E / 2).map(i => Math.fround(1 / Math.fround(rope_theta ** Math.fround(2 * i / E))));
  },

  // Angles of m times its frequency for each pair of dimensions at position m → cos, sin (T, E / 2).
  rope_angles(position_ids, frequencies) {
    const angles = position_ids.flatMap(m => frequencies.map(f => planted === "rope" ? 0 : Math.fround(m * f)));
    return [angles.map(Math.cos), angles.map(Math.sin)];
  },

  // Turn queries or keys (T, A · E) by their angles: dimension i is paired with i + E/2.
  rotate(x, [cos, sin], E) {
    const half = E / 2, T = cos.length / half, width = x.length / T, y = new Float32Array(x.length);
    for (let t = 0; t < T; t++)
      for (let head = t * width; head < (t + 1) * width; head += E)
        for (let i = 0; i < half; i++) {
          const first = x[head + i], second = x[head + half + i], c = cos[t * half + i], s = sin[t * half + i];
          y[head + i] = first * c - second * s;
          y[head + half + i] = second * c + first * s;
        }
    return y;
  },

  // Each position looks at those before it. New keys and values are written behind the old ones in cached (S, K · E).
  attention(x, { wq, wk, wv, wo }, rope, cached, past, config, watch) {
    const { num_attention_heads: A, num_key_value_heads: K, head_dim: E } = config;
    const q = llama.rotate(linear(x, wq), rope, E), k = llama.rotate(linear(x, wk), rope, E); // (T, A · E), (T, K · E)
    cached.keys.set(k, past * K * E);
    cached.values.set(linear(x, wv), past * K * E);
    const visible = t => llama.visible(past, t), heard = watch && ((t, weights) => watch(past + t, weights));
    x = scaled_dot_product_attention(q, cached.keys, cached.values, { A, K, E }, visible, heard); // (A, T, E)
    return linear(transpose(x, A, E), wo); // (T, D)
  },

  mlp(x, { gate, up, down }) {
    x = multiply(linear(x, gate).map(silu), linear(x, up)); // (T, F)
    return linear(x, down); // (T, D)
  },

  block(x, { attention_norm, attention, mlp_norm, mlp }, rope, cached, past, config, watch) {
    const normed = llama.rms_norm(x, attention_norm, config.rms_norm_eps);
    x = add(x, llama.attention(normed, attention, rope, cached, past, config, watch));
    return add(x, llama.mlp(llama.rms_norm(x, mlp_norm, config.rms_norm_eps), mlp)); // (T, D)
  },

  // Embeddings x (T, D) behind what the cache holds → the last hidden state after the norm (T, D).
  forward(x, { blocks, norm }, config, kv_cache, note = () => {}, watch) {
    const D = config.hidden_size, T = x.length / D, past = kv_cache.length;
    const rope = llama.rope_angles(range(T).map(t => past + t), llama.frequencies(config));
    blocks.forEach((block, i) => {
      x = llama.block(x, block, rope, kv_cache.layers[i], past, config, watch);
      if (i + 1 < blocks.length) note(`llama.${i + 1}`, x, D);
    });
    x = llama.rms_norm(x, norm, config.rms_norm_eps);
    note(`llama.${blocks.length}`, x, D);
    kv_cache.length += T;
    return x;
  },

  init_kv_cache(config, max_length) {
    const size = max_length * config.num_key_value_heads * config.head_dim, empty = () => new Float32Array(size);
    return { length: 0, layers: range(config.num_hidden_layers).map(() => ({ keys: empty(), values: empty() })) };
  },

  visible: (past, t) => past + t + 1, // how many keys the new query t may attend to: no later ones

  sample: argmax, // greedy: the likeliest
};

// ---------------------------------------------------------------------------------------------------------------------
// llava.py

const llava = {
  // The bridge: two linear layers with an exact GELU between them.
  projector(x, { linear_1, linear_2 }) {
    return linear(linear(x, linear_1).map(gelu), linear_2); // (P, D)
  },

  // Pixels (3, H, W) → one embedding for each patch, (P, D).
  get_image_features(pixel_values, model, note) {
    const { vision_config, vision_feature_layer, text_config } = model.config, C = vision_config.hidden_size;
    const count = model.vision.blocks.length + 1, wanted = (vision_feature_layer + count) % count; // -2: from behind
    const layer = planted === "late" ? wanted + 1 : wanted;
    const states = vision.forward(pixel_values, range(layer + 1), model.vision, vision_config); // (S, C) each
    states.forEach((state, i) => note(`vision.${i}`, state, C));
    const first = planted === "class" ? 0 : 1; // the class token stands in front
    const features = llava.projector(states[layer].subarray(first * C, (first + model.P) * C), model.projector);
    note("projector", features, text_config.hidden_size);
    return features;
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

  // A whole prompt, its picture once for each patch → the logits (V) of the word behind it.
  forward(input_ids, pixel_values, model, kv_cache, note, watch) {
    const { text_config } = model.config, features = llava.get_image_features(pixel_values, model, note);
    const x = llava.merge(input_ids, features, model); // (T, D)
    note("merge", x, text_config.hidden_size);
    return llava.head(llama.forward(x, model.llama, text_config, kv_cache, note, watch), model);
  },

  head: (x, { llama: { head } }) => linear(x.subarray(-head.inputs), head), // of the last position alone

  // Grow the image token into one for each patch.
  expand(input_ids, { config, P }) {
    return input_ids.flatMap(id => id === config.image_token_index ? Array(P).fill(id) : [id]);
  },

  // One more word, its id → the next logits (V).
  step(id, model, kv_cache, watch) {
    const { embed } = model.llama, x = embed.weight.subarray(id * embed.inputs, (id + 1) * embed.inputs);
    return llava.head(llama.forward(x, model.llama, model.config.text_config, kv_cache, undefined, watch), model);
  },

  // The one loop over time: prefill, then choose and step in turn. Yields each id with its logits, to the answer's end.
  *stream(input_ids, pixel_values, model, note, watch) {
    const { config: { text_config }, eos } = model, room = text_config.max_position_embeddings;
    const kv_cache = llama.init_kv_cache(text_config, room);
    let logits = llava.forward(input_ids, pixel_values, model, kv_cache, note, watch); // (V)
    for (;;) {
      const id = llama.sample(logits);
      yield { id, logits };
      if (eos.includes(id) || kv_cache.length === room) return;
      logits = llava.step(id, model, kv_cache, watch);
    }
  },

  // "<s>USER: <image>\n… ASSISTANT:" → ids. What stands between two special tokens is encoded as a whole.
  chat(question, { tokenizer, config }) {
    const before = llama.encode("USER: ", tokenizer), after = llama.encode(`\n${question} ASSISTANT:`, tokenizer);
    return [...tokenizer.start, ...before, config.image_token_index, ...after];
  },

  // The files of a checkpoint, by their names → the model.
  load(files) {
    const model = weights.read(files.weights), { vision_config } = files.config;
    const P = (vision_config.image_size / vision_config.patch_size) ** 2, eos = [files.generation.eos_token_id].flat();
    const tokenizer = llama.tokenizer(files.tokenizer), preprocess_config = files.preprocessor;
    return Object.assign(model, { config: files.config, P, eos, tokenizer, preprocess_config });
  },
};
