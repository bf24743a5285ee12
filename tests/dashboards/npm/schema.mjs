// Compiles dashboards against Grafana's published types: what is missing, misspelt or of another
// type is an error of the compiler. Prints the errors as JSON.
//
//     node schema.mjs DASHBOARD.json...
import fs from 'node:fs';
import path from 'node:path';
import ts from 'typescript';

const OF_PANELS = './node_modules/@grafana/schema/dist/types/raw/composable';

// Enums are written by their values in JSON. An annotation's query is that of its data source, and
// of Prometheus it has three more fields that no type declares.
const TYPES = `
import type * as schema from '@grafana/schema';
type Plain<T> = T extends string ? \`\${T}\`
  : T extends number | boolean | bigint | null | undefined ? T
  : T extends (infer U)[] ? Plain<U>[]
  : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;
type Annotation = schema.AnnotationQuery<schema.DataQuery & Record<string, unknown>> &
  { titleFormat?: string; textFormat?: string; tagKeys?: string };
type Dashboard = Omit<schema.Dashboard, 'annotations'> & { annotations: { list: Annotation[] } };
`;

const lines = [TYPES];
const kinds = new Set();
for (const [index, file] of process.argv.slice(2).entries()) {
  const dashboard = JSON.parse(fs.readFileSync(file, 'utf8'));
  lines.push(`export const d${index}: Plain<Dashboard> = ${JSON.stringify(dashboard, null, 1)};`);
  const panels = dashboard.panels.flatMap((panel) => [panel, ...(panel.panels ?? [])]);
  for (const panel of panels.filter((panel) => panel.type !== 'row')) {
    kinds.add(panel.type);
    const named = `p${index}_${panel.id}`;
    // What the panel's own plugin takes.
    lines.push(
      `export const ${named}: Plain<${panel.type.replace('-', '_')}.Options> = ` +
        `${JSON.stringify(panel.options)};`,
    );
    const custom = panel.fieldConfig.defaults.custom;
    if (custom !== undefined) {
      lines.push(
        `export const c${named}: Plain<${panel.type.replace('-', '_')}.FieldConfig> = ` +
          `${JSON.stringify(custom)};`,
      );
    }
  }
}
for (const kind of kinds) {
  const place = `${OF_PANELS}/${kind.replace('-', '')}/panelcfg/x/types.gen.js`;
  lines.unshift(`import type * as ${kind.replace('-', '_')} from '${place}';`);
}
const written = path.resolve(`dashboards-${process.pid}.ts`);
fs.writeFileSync(written, lines.join('\n'));
const program = ts.createProgram([written], {
  noEmit: true,
  strict: true,
  skipLibCheck: true,
  module: ts.ModuleKind.NodeNext,
  moduleResolution: ts.ModuleResolutionKind.NodeNext,
  target: ts.ScriptTarget.ES2022,
  types: [],
});
const found = ts.getPreEmitDiagnostics(program).map((error) => {
  const line = error.file?.getLineAndCharacterOfPosition(error.start ?? 0).line ?? 0;
  const at = error.file?.text.split('\n').slice(Math.max(0, line - 2), line + 1).join(' ') ?? '';
  return `${ts.flattenDiagnosticMessageText(error.messageText, ' ')} at ${at.slice(0, 300)}`;
});
fs.unlinkSync(written);
console.log(JSON.stringify(found));
