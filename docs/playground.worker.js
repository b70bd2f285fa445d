// What the page asks of the model: every stage of a pass, or an answer word by word with where each word looked.
// There is nothing of LLaVA here, this only writes down what happens in playground.llava.js. Both run in a worker.

// What is done to the picture before the eye sees it: nothing, a plain cover, or its patches in another order.
function change(pixels, how, { image_size, patch_size }) {
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
}

// Attention of words on patches, a row for each word → how much more each looks there than all do on average, as in
// extras/lens.py.
function without_sinks(rows) {
  const mean = rows[0].map((_, i) => rows.reduce((sum, row) => sum + row[i] / rows.length, 0));
  return rows.map(row => row.map((weight, i) => Math.max(0, weight - mean[i])));
}

// What goes into the model, and `first`, the place of the first word behind the picture.
function prepare(model, image, question, how) {
  const { config, P } = model, ids = llava.expand(llava.chat(question, model), model);
  if (ids.length >= config.text_config.max_position_embeddings) throw new Error("The question is too long for tiny.");
  const pixels = change(vision.preprocess(image, model.preprocess_config), how, config.vision_config);
  return { ids, pixels, first: ids.lastIndexOf(config.image_token_index) + 1 };
}

// Every stage of one pass, named as in tests/parity.py: { name: { shape, data } }.
function stages(model, image, question, how) {
  const { ids, pixels } = prepare(model, image, question, how), { config, P } = model, found = {}, seen = {};
  const size = config.vision_config.image_size;
  const put = (name, data, ...shape) => found[name] = { shape: [1, ...shape], data };
  llava.stream(ids, pixels, model, (name, data, width) => seen[name] = [data, data.length / width, width]).next();
  put("ids", Float32Array.from(ids), ids.length);
  put("pixels", pixels, 3, size, size);
  const all = range(model.vision.blocks.length + 1); // the unused one, too
  vision.forward(pixels, all, model.vision, config.vision_config)
    .forEach((state, i) => put(`vision.${i}`, state, P + 1, config.vision_config.hidden_size));
  for (const name of Object.keys(seen).filter(name => !name.startsWith("vision"))) put(name, ...seen[name]);
  const logits = linear(found[`llama.${model.llama.blocks.length}`].data, model.llama.head);
  put("logits", logits, ids.length, model.llama.head.outputs);
  return found;
}

// Yields { word } for each of at most `limit` tokens, at last { done }: where each looked, and every stage on the way.
function* answer(model, image, question, how, limit = Infinity) {
  const began = performance.now(), { config, tokenizer, P } = model;
  const { ids, pixels, first } = prepare(model, image, question, how);
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
      token = argmax(left);
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
        post({ job, done: { parameters: model.parameters, config: model.config } });
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
