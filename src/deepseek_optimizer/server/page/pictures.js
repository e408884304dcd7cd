// Pictures of messages: they are scaled down in the browser and kept in the conversation (see conversation.js), without the
// metadata of the file.

import { LONGEST_PICTURE } from './conversation.js';
import { showPicture } from './dialogs.js';
import { el, iconButton } from './dom.js';
import { t } from './i18n.js';

const MAX_FILE = 50e6; // bytes
const MAX_SIDE = 2048; // pixels; models see no more
const MAX_RATIO = 200; // of the longer side to the shorter, as on the server
const QUALITY = 0.9; // of JPEG
const SHRINK = 0.75; // of the sides, if a picture is still too large

/** Why a file is not used as a picture; `message` is for the user. */
export class PictureError extends Error {}

export const isPicture = (file) => file.type.startsWith('image/');

/** A file as a picture of a message: {name, url, width, height}. Throws a PictureError. */
export async function readPicture(file) {
  if (file.size > MAX_FILE) throw new PictureError(t('pictureTooLarge'));
  let bitmap;
  try {
    bitmap = await createImageBitmap(file); // upright, if its metadata says how it was taken
  } catch {
    throw new PictureError(t('pictureUnreadable'));
  }
  try {
    const { width, height } = bitmap;
    if (Math.max(width, height) > MAX_RATIO * Math.min(width, height)) throw new PictureError(t('pictureNarrow'));
    const lossless = file.type !== 'image/jpeg';
    for (let scale = Math.min(1, MAX_SIDE / Math.max(width, height)); ; scale *= SHRINK) {
      const canvas = drawn(bitmap, Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale)));
      const urls = [lossless && canvas.toDataURL('image/png'), canvas.toDataURL('image/jpeg', QUALITY)];
      const url = urls.find((one) => one && one.length <= LONGEST_PICTURE);
      if (url) return { name: file.name, url, width: canvas.width, height: canvas.height };
    }
  } finally {
    bitmap.close();
  }
}

function drawn(bitmap, width, height) {
  const canvas = el('canvas', { width, height });
  const context = canvas.getContext('2d', { alpha: false });
  context.fillStyle = 'white'; // behind transparent pixels, as on the server
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = 'high';
  context.drawImage(bitmap, 0, 0, width, height);
  return canvas;
}

/** A small picture that opens the whole one; `remove`: the action of its remove button, if it has one. */
export function thumbnail(picture, { remove = null } = {}) {
  const { name, url, width, height } = picture;
  const label = t('openPicture', { name });
  const open = el('button.picture-open', { type: 'button', 'aria-label': label, title: name, onclick: () => showPicture(picture) });
  open.append(el('img', { src: url, alt: '', width, height, draggable: 'false' }));
  return el('li.picture', {}, open, remove && iconButton('close', t('removeFile', { name }), remove, '.picture-remove'));
}
