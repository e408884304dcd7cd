// Formulas by KaTeX, as MathML, which browsers render and screen readers support. KaTeX's tree is converted to elements here: only
// the elements and attributes named in this file, so that TeX cannot insert anything else into the page.

const MATHML = 'http://www.w3.org/1998/Math/MathML';
const LONGEST = 5000; // characters; a longer formula is shown as TeX
const ELEMENTS = new Set(
  `math mrow mi mn mo ms mtext mspace mfrac msqrt mroot msub msup msubsup munder mover munderover mmultiscripts mprescripts mtable
  mtr mtd mstyle mpadded mphantom menclose merror semantics`.split(/\s+/),
);
const ATTRIBUTES = new Set(
  `display displaystyle scriptlevel mathvariant stretchy fence separator symmetric largeop movablelimits accent accentunder form
  minsize maxsize lspace rspace linethickness width height depth voffset columnalign columnspacing rowspacing columnlines rowlines
  notation`.split(/\s+/),
);
const COLOUR = /^(#[0-9a-f]{3,8}|[a-z]+)$/i;
const LENGTH = /^[\d.]+em$/;

/** A function (tex, display) -> a <math> element, or null if KaTeX cannot parse the TeX. */
export const mathSetter = (katex) => (tex, display) => {
  if (tex.length > LONGEST) return null;
  try {
    const tree = katex.__renderToDomTree(tex, { output: 'mathml', displayMode: display, trust: false, strict: 'ignore', maxExpand: 500, maxSize: 50 });
    return nodesOf(tree)[0] ?? null;
  } catch (error) {
    if (!(error instanceof katex.ParseError || error instanceof RangeError)) console.error(error); // RangeError: nested too deeply
    return null;
  }
};

function nodesOf(node) {
  if (node.text !== undefined) return [document.createTextNode(node.text)];
  if (node.type === undefined && typeof node.width === 'number') return [element('mspace', { width: `${node.width}em` }, [])];
  const children = node.children ?? [];
  if (!ELEMENTS.has(node.type)) return node.type === 'annotation' ? [] : children.flatMap(nodesOf);
  return [element(node.type, node.attributes ?? {}, children.flatMap(nodesOf))];
}

function element(name, attributes, children) {
  const node = document.createElementNS(MATHML, name);
  for (const [key, value] of Object.entries(attributes)) {
    if (ATTRIBUTES.has(key)) node.setAttribute(key, value);
    else if (key === 'mathcolor' && COLOUR.test(value)) node.style.setProperty('color', value);
    else if (key === 'mathbackground' && COLOUR.test(value)) node.style.setProperty('background', value);
  }
  node.append(...children.map(spaced));
  style(node, attributes);
  return node;
}

/** "log p": between a function and its argument, KaTeX has an invisible operator, and TeX a thin space. */
function spaced(child, index, children) {
  const applies = child.localName === 'mo' && child.textContent === '\u2061' && children[index + 1]?.localName !== 'mo';
  return applies ? element('mspace', { width: '0.1667em' }, []) : child;
}

/** Properties without an attribute in browsers' MathML: alphabets are separate characters, the rest is style. */
function style(node, attributes) {
  const alphabet = ALPHABETS[attributes.mathvariant];
  if (alphabet) {
    node.textContent = [...node.textContent].map((ch) => inAlphabet(ch, alphabet)).join('');
    node.setAttribute('mathvariant', 'normal');
  }
  if (node.localName === 'mtable') styleTable(node, attributes);
}

function styleTable(table, { columnalign = '', columnspacing = '', rowspacing = '' }) {
  const [aligned, columnGaps, rowGaps] = [columnalign, columnspacing, rowspacing].map((list) => list.split(' '));
  for (const [y, row] of [...table.children].entries()) {
    const cells = [...row.children];
    for (const [x, cell] of cells.entries()) {
      if (['left', 'right', 'center'].includes(aligned[x])) cell.style.setProperty('text-align', aligned[x]);
      if (x > 0 && LENGTH.test(columnGaps[x - 1])) cell.style.setProperty('padding-inline-start', columnGaps[x - 1]);
      if (cells.length > 1) cell.style.setProperty('padding-inline-end', '0');
      if (y > 0 && LENGTH.test(rowGaps[y - 1])) cell.style.setProperty('padding-top', rowGaps[y - 1]);
    }
  }
}

/** Code points of A, a and 0 of an alphabet, and of letters that Unicode encodes elsewhere. */
const ALPHABETS = {
  'double-struck': { A: 0x1d538, a: 0x1d552, 0: 0x1d7d8, others: { C: 'ℂ', H: 'ℍ', N: 'ℕ', P: 'ℙ', Q: 'ℚ', R: 'ℝ', Z: 'ℤ' } },
  script: { A: 0x1d49c, a: 0x1d4b6, others: { B: 'ℬ', E: 'ℰ', F: 'ℱ', H: 'ℋ', I: 'ℐ', L: 'ℒ', M: 'ℳ', R: 'ℛ', e: 'ℯ', g: 'ℊ', o: 'ℴ' } },
  fraktur: { A: 0x1d504, a: 0x1d51e, others: { C: 'ℭ', H: 'ℌ', I: 'ℑ', R: 'ℜ', Z: 'ℨ' } },
};

function inAlphabet(ch, { others, ...starts }) {
  if (others[ch]) return others[ch];
  for (const [first, last] of ['AZ', 'az', '09']) {
    if (starts[first] && ch >= first && ch <= last) return String.fromCodePoint(starts[first] + ch.codePointAt(0) - first.codePointAt(0));
  }
  return ch;
}
