/** A small Python tokenizer: enough to colour code, not to judge it. */

export type Kind = "comment" | "string" | "keyword" | "builtin" | "number" | "def" | "meta" | "operator" | "plain";

export interface Piece {
  kind: Kind;
  text: string;
}

const KEYWORDS = new Set(
  "and as assert async await break case class continue def del elif else except finally for from global if import in is lambda match nonlocal not or pass raise return try while with yield None True False".split(" "),
);
const BUILTINS = new Set(
  "abs all any bool bytes dict enumerate float int isinstance len list map max min open print range repr round set sorted str sum super tuple type zip".split(" "),
);

// Triple quotes first: a single-quote rule would take `""` for an empty string. Unfinished strings run to the end.
const TOKEN = new RegExp(
  [
    "(?<comment>#[^\\n]*)",
    "(?<string>[rbfuRBFU]{0,2}(?:\"\"\"(?:\\\\[^]|(?!\"\"\")[^])*(?:\"\"\"|$)|'''(?:\\\\[^]|(?!''')[^])*(?:'''|$)|\"(?:\\\\[^]|[^\"\\\\\\n])*\"?|'(?:\\\\[^]|[^'\\\\\\n])*'?))",
    "(?<meta>@[\\w.]+)",
    "(?<number>(?:0[xob][\\da-fA-F_]+|\\d[\\d_]*\\.?[\\d_]*(?:[eE][+-]?\\d+)?j?))",
    "(?<word>[\\p{L}_][\\p{L}\\p{N}_]*)",
    "(?<operator>[-+*/%=<>!&|^~@:]+)",
    "(?<plain>\\s+|[^])",
  ].join("|"),
  "gu",
);

export function tokens(code: string): Piece[] {
  const pieces: Piece[] = [];
  let before = "";
  for (const match of code.matchAll(TOKEN)) {
    const text = match[0];
    const [name] = Object.entries(match.groups ?? {}).find(([, value]) => value !== undefined) ?? ["plain"];
    const kind = name === "word" ? wordKind(text, before) : (name as Kind);
    const last = pieces.at(-1);
    if (last && last.kind === kind) last.text += text;
    else pieces.push({ kind, text });
    if (text.trim()) before = text;
  }
  return pieces;
}

function wordKind(word: string, before: string): Kind {
  if (before === ".") return "plain";
  if (before === "def" || before === "class") return "def";
  if (KEYWORDS.has(word)) return "keyword";
  return BUILTINS.has(word) ? "builtin" : "plain";
}
