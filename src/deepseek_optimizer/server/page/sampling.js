// The sampling settings of the page. An empty one is not sent, so that the default of the server or the model applies.

const LARGEST_SEED = Number.MAX_SAFE_INTEGER; // larger integers are not exact in JavaScript

/** Name in the request, bounds (inclusive), and whether it must be an integer. */
export const FIELDS = [
  { name: 'temperature', min: 0, max: 2, step: 0.05 },
  { name: 'top_p', min: 0.01, max: 1, step: 0.01 },
  { name: 'top_k', min: 0, max: 100000, whole: true },
  { name: 'min_p', min: 0, max: 1, step: 0.01 },
  { name: 'repetition_penalty', min: 0.5, max: 2, step: 0.05 },
  { name: 'max_tokens', min: 1, max: 1000000, whole: true },
  { name: 'seed', min: 0, max: LARGEST_SEED, whole: true },
];

/** The number that was entered: {value}, undefined if the field is empty, or {error: 'notNumber' | 'notWhole' | 'outOfRange'}. */
export function readField(field, text, badInput = false) {
  if (badInput) return { error: 'notNumber' };
  if (text.trim() === '') return { value: undefined };
  const value = Number(text);
  if (!Number.isFinite(value)) return { error: 'notNumber' };
  if (value < field.min || value > field.max) return { error: 'outOfRange' };
  if (field.whole && !Number.isInteger(value)) return { error: 'notWhole' };
  return { value };
}

/** The supported settings in `stored` that are within bounds; stored values may be outdated or edited. */
export function cleanSettings(stored) {
  const clean = {};
  for (const field of FIELDS) {
    const value = stored?.[field.name];
    if (typeof value === 'number' && readField(field, String(value)).error === undefined) clean[field.name] = value;
  }
  return clean;
}
