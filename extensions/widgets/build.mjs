// Bundles every front end into workbench/widgets/static, one file each, CSS inside, nothing fetched.
import * as esbuild from "esbuild";
import { mkdirSync, statSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const outdir = join(here, "../../workbench/widgets/static");
const LIMIT_KB = 100;

const shared = {
  bundle: true,
  minify: true,
  target: "es2022",
  // Bundles travel through JSON and HTML; ASCII keeps every host's encoding out of it.
  charset: "ascii",
  legalComments: "none",
  loader: { ".css": "text" },
  logLevel: "warning",
  outdir,
};
const widgets = ["tree", "controls", "scrubber", "patch_map", "images", "code"];
const builds = [
  { ...shared, format: "esm", entryPoints: widgets.map((name) => join(here, `src/${name}.ts`)) },
  { ...shared, format: "iife", entryPoints: [join(here, "src/page.ts")] },
];

/** Minifies the CSS that is imported as text (esbuild leaves text alone). */
const minifyCss = {
  name: "minify-css",
  setup(build) {
    build.onLoad({ filter: /\.css$/ }, async ({ path }) => {
      const { readFile } = await import("node:fs/promises");
      const source = await readFile(path, "utf8");
      const { code } = await esbuild.transform(source, { loader: "css", minify: true, target: "chrome120" });
      return { contents: code, loader: "text" };
    });
  },
};

function report(result) {
  for (const file of Object.keys(result.metafile.outputs)) {
    const kb = statSync(join(process.cwd(), file)).size / 1024;
    console.log(`${basename(file).padEnd(16)} ${kb.toFixed(1).padStart(6)} KB`);
    if (kb > LIMIT_KB) throw new Error(`${file} is ${kb.toFixed(0)} KB; the limit is ${LIMIT_KB} KB`);
  }
}

mkdirSync(outdir, { recursive: true });
for (const options of builds) {
  const full = { ...options, metafile: true, plugins: [minifyCss] };
  if (process.argv.includes("--watch")) {
    await (await esbuild.context(full)).watch();
  } else {
    report(await esbuild.build(full));
  }
}
