/** The component tree as data: who is whose child, what is unfolded, which rows show. */

export interface TreeNode {
  path: string;
  name: string;
  cls: string;
  depth: number;
  parameters: number;
  dtype: string;
  device: string;
  shape: string;
  kind: "component" | "module" | "attention" | "other";
}

export interface Row {
  node: TreeNode;
  hasChildren: boolean;
  unfolded: boolean;
}

const DENOISERS = /^(unet|transformer|denoiser|prior)(_\d+)?$/;

/** `down_blocks.0.attentions.1` → `model.unet.down_blocks[0].attentions[1].output`. */
export function accessCode(variable: string, path: string): string {
  let code = variable;
  for (const part of path.split(".")) {
    if (/^\d+$/.test(part)) code += `[${part}]`;
    else if (/^[\p{L}_][\p{L}\p{N}_]*$/u.test(part)) code += `.${part}`;
    else return `${variable}.site(${JSON.stringify(path)})`;
  }
  return `${code}.output`;
}

/** For each node the index one past its last descendant (nodes come in preorder). */
function subtreeEnds(nodes: readonly TreeNode[]): number[] {
  const ends = new Array<number>(nodes.length).fill(nodes.length);
  const open: number[] = [];
  nodes.forEach((node, i) => {
    while (open.length && nodes[open.at(-1)!]!.depth >= node.depth) ends[open.pop()!] = i;
    open.push(i);
  });
  return ends;
}

export class Tree {
  readonly ends: number[];
  readonly unfolded: Set<string>;
  private readonly lower: string[];

  constructor(readonly nodes: readonly TreeNode[], before?: Set<string>) {
    this.ends = subtreeEnds(nodes);
    this.lower = nodes.map((node) => `${node.path} ${node.cls}`.toLowerCase());
    const known = new Set(nodes.map((node) => node.path));
    const kept = [...(before ?? [])].filter((path) => known.has(path));
    this.unfolded = new Set(before?.size ? kept : this.firstLook());
  }

  private firstLook(): string[] {
    const top = this.nodes.filter((node) => node.depth === 0);
    const denoisers = top.filter((node) => DENOISERS.test(node.name));
    return (denoisers.length ? denoisers : top.length === 1 ? top : []).map((node) => node.path);
  }

  hasChildren(i: number): boolean {
    return this.ends[i]! > i + 1;
  }

  /** The rows that show: those under unfolded parents, or, while searching, matches and their ancestors. */
  rows(query: string): { rows: Row[]; matches: number } {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    return words.length ? this.found(words) : { rows: this.open(), matches: 0 };
  }

  private row(i: number, unfolded: boolean): Row {
    return { node: this.nodes[i]!, hasChildren: this.hasChildren(i), unfolded };
  }

  private open(): Row[] {
    const rows: Row[] = [];
    for (let i = 0; i < this.nodes.length; ) {
      const unfolded = this.unfolded.has(this.nodes[i]!.path);
      rows.push(this.row(i, unfolded && this.hasChildren(i)));
      i = unfolded ? i + 1 : this.ends[i]!;
    }
    return rows;
  }

  private found(words: string[]): { rows: Row[]; matches: number } {
    const keep = new Set<number>();
    const ancestors: number[] = [];
    let matches = 0;
    this.nodes.forEach((_, i) => {
      while (ancestors.length && this.ends[ancestors.at(-1)!]! <= i) ancestors.pop();
      if (words.every((word) => this.lower[i]!.includes(word))) {
        matches += 1;
        for (const ancestor of ancestors) keep.add(ancestor);
        keep.add(i);
      }
      ancestors.push(i);
    });
    const shown = [...keep].sort((a, b) => a - b);
    return { rows: shown.map((i, n) => this.row(i, (shown[n + 1] ?? Infinity) < this.ends[i]!)), matches };
  }

  /** Unfolds every ancestor of a path. */
  reveal(path: string): void {
    const parts = path.split(".");
    for (let n = 1; n < parts.length; n++) this.unfolded.add(parts.slice(0, n).join("."));
  }
}
