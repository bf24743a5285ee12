// Puts the page and all it needs into a script and a style sheet, and prints both as JSON.
import { build } from 'esbuild';

const made = await build({
  entryPoints: ['page.jsx'],
  bundle: true,
  write: false,
  outdir: 'bundled',
  format: 'iife',
  jsx: 'automatic',
  define: { 'process.env.NODE_ENV': '"production"', global: 'window' },
  loader: { '.svg': 'empty', '.ttf': 'empty', '.woff2': 'empty', '.png': 'empty' },
  logLevel: 'error',
});
const of = (kind) => made.outputFiles.find((file) => file.path.endsWith(kind)).text;
console.log(JSON.stringify({ script: of('.js'), style: of('.css') }));
