// weights.py in plain JavaScript: how the numbers are stored. A safetensors file is the length of a header, the header
// (name → dtype, shape, where), and the numbers, row after row.

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
