// The page's data: inflated when it is opened, tokens when they are asked for.

const FIELDS = ["rollout_logprob", "mismatch", "reference_difference", "entropy", "token_score", "token_weight"];
const BYTES_A_TOKEN = 4 + 2 * FIELDS.length;

/** Returns the inflated bytes of a data element. */
async function inflate(id) {
  const base64 = document.getElementById(id).textContent;
  const bytes = Uint8Array.fromBase64 ? Uint8Array.fromBase64(base64) : Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

async function openData() {
  const data = JSON.parse(new TextDecoder().decode(await inflate("data")));
  data.items.forEach((item, index) => (item.index = index));
  return data;
}

const chunks = new Map();

/** Returns the tokens of an item: `piece` of each, and a Float32Array for each field; null without. */
async function tokensOf(item) {
  if (!item.n) return null;
  if (!chunks.has(item.chunk)) chunks.set(item.chunk, inflate(`chunk-${item.chunk}`));
  const buffer = await chunks.get(item.chunk);
  let offset = item.start * BYTES_A_TOKEN;
  const tokens = { piece: new Int32Array(buffer, offset, item.n) };
  offset += 4 * item.n;
  for (const name of FIELDS) {
    tokens[name] = Float32Array.from(new Uint16Array(buffer, offset, item.n), half);
    offset += 2 * item.n;
  }
  return withMeans(tokens, item.n);
}

/** Adds the running mean of the scores, q = sigmoid of it, and the two other log-probabilities. */
function withMeans(tokens, n) {
  const mean = new Float64Array(n),
    q = new Float64Array(n),
    policy = new Float64Array(n),
    reference = new Float64Array(n);
  let sum = 0;
  for (let t = 0; t < n; t++) {
    sum += tokens.token_score[t];
    mean[t] = sum / (t + 1);
    q[t] = 1 / (1 + Math.exp(-mean[t]));
    policy[t] = tokens.rollout_logprob[t] + tokens.mismatch[t];
    reference[t] = policy[t] + tokens.reference_difference[t];
  }
  return { ...tokens, mean, q, policy, reference, scored: !Number.isNaN(sum) };
}

/** Returns the number whose IEEE half-precision bits these are. */
function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1,
    exponent = (bits >> 10) & 31,
    fraction = bits & 0x3ff;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/** Returns the text of each token: a character that several tokens share shows with the last. */
function textsOf(data, pieces) {
  const decoder = new TextDecoder();
  const texts = Array.from(pieces, (piece) => {
    const latin = data.pieces[piece];
    return decoder.decode(
      Uint8Array.from(latin, (c) => c.charCodeAt(0)),
      { stream: true },
    );
  });
  const rest = decoder.decode();
  if (rest && texts.length) texts[texts.length - 1] += rest;
  return texts;
}

/** Returns the token after which q falls the most: its index, q before and q after it; or null. */
function largestFall(tokens, scoreIsBefore) {
  let fall = null;
  for (let t = 0; t + 1 < tokens.q.length; t++) {
    const by = tokens.q[t] - tokens.q[t + 1];
    if (fall === null || by > fall.by)
      fall = { by, index: scoreIsBefore ? t : t + 1, before: tokens.q[t], after: tokens.q[t + 1] };
  }
  return tokens.scored ? fall : null;
}
