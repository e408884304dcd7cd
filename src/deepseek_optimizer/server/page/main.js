import { App } from './app.js';
import { byId } from './dom.js';
import { translate } from './i18n.js';
import { loadLibraries } from './libraries.js';
import { streamMaker } from './markdown_stream.js';
import { Store } from './store.js';

translate();
const [store, libraries] = await Promise.all([Store.open(), loadLibraries()]);
byId('plain-text').hidden = libraries !== null;
const app = new App(store, streamMaker(libraries));
await app.start();
