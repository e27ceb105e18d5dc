/** Weights of words in a prompt: (word:1.1). */

const STEP = 0.1;
const WEIGHTED = /(?<!\\)\(((?:[^()\\]|\\.)*):\s*(\d*\.?\d+)\)/g;
const LORA = /<lora:([^:<>]+):(-?\d*\.?\d+)>/g;
const WORD = /[\p{L}\p{N}_'’-]/u;

/**
 * The change that gives what is selected, or the word at the caret, a step more or less weight.
 * @param {string} text
 * @param {number} start of the selection
 * @param {number} end
 * @param {1|-1} direction
 * @returns {{start: number, end: number, text: string, select: [number, number]}|null} what to put in place of the text
 *     from start to end, and what is selected then; null where there is no word
 */
export function weighed(text, start, end, direction) {
  return (
    reweighed(text, LORA, start, end, direction, (name, weight) => [`<lora:${name}:${weight}>`, 6]) ??
    reweighed(text, WEIGHTED, start, end, direction, (words, weight) =>
      weight === "1" ? [words, 0] : [`(${words}:${weight})`, 1],
    ) ??
    wrapped(text, start, end, direction)
  );
}

/** The same for what has a weight already, found by a pattern of (words, weight). */
function reweighed(text, pattern, start, end, direction, write) {
  const endOf = (match) => match.index + match[0].length;
  const found = [...text.matchAll(pattern)].find((match) => match.index <= start && end <= endOf(match));
  if (!found) return null;
  const [written, before] = write(found[1], rounded(Number(found[2]) + direction * STEP));
  const from = found.index + before;
  return { start: found.index, end: endOf(found), text: written, select: [from, from + found[1].length] };
}

function wrapped(text, start, end, direction) {
  const [from, to] = start === end ? wordAt(text, start) : trimmed(text, start, end);
  if (from >= to) return null;
  const words = text.slice(from, to);
  return { start: from, end: to, text: `(${words}:${rounded(1 + direction * STEP)})`, select: [from + 1, to + 1] };
}

function wordAt(text, caret) {
  let [from, to] = [caret, caret];
  while (from > 0 && WORD.test(text[from - 1])) from--;
  while (to < text.length && WORD.test(text[to])) to++;
  return [from, to];
}

function trimmed(text, start, end) {
  const selected = text.slice(start, end);
  return [start + selected.length - selected.trimStart().length, end - selected.length + selected.trimEnd().length];
}

function rounded(weight) {
  return String(Math.round(weight * 100) / 100);
}
