// Reads [{panel, answers}] as JSON, and says what Grafana's own packages make of them: of each panel
// its frames, of each field its name, values, last value as it is written, colour and style.
import fs from 'node:fs';

globalThis.navigator ??= { language: 'en' };
const { formattedValueToString, getFieldDisplayName } = await import('@grafana/data');
const { prepared } = await import('./grafana.mjs');

const told = [];
for (const { panel, answers } of JSON.parse(fs.readFileSync(0, 'utf8'))) {
  const frames = await prepared(panel, answers);
  told.push(
    frames.map((frame) =>
      frame.fields.map((field) => {
        const last = field.display?.(field.values.at(-1));
        return {
          name: getFieldDisplayName(field, frame, frames),
          type: field.type,
          values: field.values,
          written: last && formattedValueToString(last),
          colour: last?.color,
          custom: field.config.custom ?? {},
        };
      }),
    ),
  );
}
console.log(JSON.stringify(told));
