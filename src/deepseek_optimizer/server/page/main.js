// Starts the page.

import { App } from './app.js';
import { translate } from './i18n.js';
import { Store } from './store.js';

translate();
const app = new App(await Store.open());
await app.start();
