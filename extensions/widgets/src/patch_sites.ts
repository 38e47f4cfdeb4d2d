/** Short names of sites for the rows of a map; the tooltip has the whole ones. */

const SHORT: Record<string, string> = {
  down_blocks: "down",
  up_blocks: "up",
  mid_block: "mid",
  attentions: "attn",
  resnets: "res",
  transformer_blocks: "block",
  single_transformer_blocks: "single",
};

/** What tells the sites apart: without the parts that all begin or end with, the usual words cut short. */
export function shorten(sites: readonly string[]): string[] {
  const parts = sites.map((site) => site.replace(/:output$/, "").split("."));
  if (parts.length > 1) {
    trim(parts, (all) => all[0], (all) => all.shift());
    trim(parts, (all) => all.at(-1), (all) => all.pop());
  }
  return parts.map((all) => all.map((part) => SHORT[part] ?? part).join("."));
}

/** Takes away a part while all have the same one there and each has another left. */
function trim(parts: string[][], look: (all: string[]) => string | undefined, take: (all: string[]) => void): void {
  while (parts.every((all) => all.length > 1 && look(all) === look(parts[0]!))) parts.forEach(take);
}
